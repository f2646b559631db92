/** The secret of a link, which stands in the address only until it is read. */

/** Returns the address's fragment, which leaves the address bar and this tab's history at once. */
export function takeFragment(): string {
  const { hash, pathname, search } = location;
  if (hash) history.replaceState(null, "", pathname + search);
  return hash;
}

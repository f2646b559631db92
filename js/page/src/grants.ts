/** What lets this browser in: tickets of share links, each bound to this browser's device key once it was used. */

import { toBase64Url, toHex } from "../../src/bytes.js";
import { UsageError } from "../../src/errors.js";
import { type ParsedLink, parseLink } from "../../src/links.js";

export type Mode = "drive" | "watch";

/** One ticket and what it is for. */
export interface Grant {
  id: string;
  /** The node's id in hexadecimal. */
  node: string;
  ticket: string;
  /** The session's uid in hexadecimal; null: all sessions that the ticket allows. */
  session: string | null;
  agent: string | null;
  mode: Mode;
  /** The session's name when it was last seen. */
  name: string;
  added: number;
}

/** How many a browser keeps. */
export const GRANTS_MAX = 64;
const HASH_BYTES = 8;

/**
 * Returns what a fragment or link says; null where there is no ticket in it. Throws UsageError.
 *
 * Two tickets are never the same grant, whatever their links say they are for: no link takes the place of another.
 */
export async function grantOf(link: ParsedLink, node: string | null, now: number): Promise<Grant | null> {
  if (link.ticket === null) return null;
  const id = link.node === null ? node : toHex(link.node);
  if (id === null) throw new UsageError("The link does not name its node, and the node does not answer: try it later.");
  if (node !== null && node !== id)
    throw new UsageError("This link is for another node than the one at this address: ask for a new one.");
  const session = link.session === null ? null : toHex(link.session);
  const mode = link.mode ?? "drive";
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(link.ticket));
  const hash = toHex(new Uint8Array(digest, 0, HASH_BYTES));
  return {
    id: [id.slice(0, 16), hash, session ?? "*", link.agent ?? "", mode].join("/"),
    node: id,
    ticket: link.ticket,
    session,
    agent: link.agent,
    mode,
    name: "",
    added: now,
  };
}

/** Returns what a grant is for, in words. */
export function grantText({ session, agent, name, mode }: Grant): string {
  const what = session === null ? (agent ?? "all sessions") : name || agent || "one session";
  return mode === "watch" ? `${what} (watch only)` : what;
}

/** Returns the link in a text that somebody pasted, whatever stands around it. Throws UsageError. */
export function pastedLink(text: string): ParsedLink {
  const found = /\b(?:https|sterna):\/\/\S+/.exec(text);
  return parseLink((found === null ? text : found[0]).trim());
}

/** Returns the link of a page's own address with this fragment. Throws UsageError. */
export function fragmentLink(host: string, fragment: string): ParsedLink {
  return parseLink(`https://${host}/${fragment}`);
}

/** Returns the fragment that says what a link says, to open it at its own address. */
export function fragmentOf(link: ParsedLink): string {
  const fields: string[] = [];
  if (link.ticket !== null) fields.push(`t=${link.ticket}`);
  if (link.session !== null) fields.push(`s=${toBase64Url(link.session)}`);
  if (link.agent !== null) fields.push(`a=${link.agent}`);
  if (link.mode !== null) fields.push(`m=${link.mode}`);
  if (link.node !== null) fields.push(`n=${toBase64Url(link.node)}`);
  return `#${fields.join("&")}`;
}

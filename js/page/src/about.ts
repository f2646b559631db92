/** Which node this page is from. */

export interface NodeAbout {
  id: string | null;
  name: string;
  version: string;
}

const WAIT_MS = 3_000;

/** Asks the page's own server; a node that does not answer is one that says nothing of itself. */
export async function fetchNode(): Promise<NodeAbout> {
  try {
    if (!navigator.onLine) throw new Error("offline");
    const answer = await fetch("/node", { cache: "no-store", signal: AbortSignal.timeout(WAIT_MS) });
    const { id, name, version } = (await answer.json()) as { [key: string]: unknown };
    const text = (value: unknown): string => (typeof value === "string" ? value.slice(0, 80) : "");
    return { id: /^[0-9a-f]{64}$/.test(text(id)) ? text(id) : null, name: text(name), version: text(version) };
  } catch {
    return { id: null, name: "", version: "" };
  }
}

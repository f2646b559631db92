/** Share links, and node ids as people write them. The secret stands in the fragment, which browsers never send. */

import { type Bytes, fromBase64Url, fromHex } from "./bytes.js";
import { UsageError } from "./errors.js";
import { LINK_FIELDS_MAX, LINK_MAX_CHARS } from "./limits.js";

const NODE_ID_BYTES = 32;
const UID_BYTES = 16;
const HOST = String.raw`[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]`;
const PATH = String.raw`\/[A-Za-z0-9._~/-]{0,200}`;
const LINK = new RegExp(
  String.raw`^(https|sterna|wss|ws):\/\/(${HOST})(?::([0-9]{1,5}))?(${PATH})?(?:\?([^#]*))?(?:#(.*))?$`,
);
const FIELD = /^([a-z])=([A-Za-z0-9._-]{1,128})$/;
const DEFAULT_PORTS: { [scheme: string]: number } = { https: 443, wss: 443, ws: 80, sterna: 7220 };

/** What an address or share link says; what it does not say is null. */
export interface ParsedLink {
  scheme: "https" | "sterna" | "wss" | "ws";
  host: string;
  /** The port in the address: of the web page in an https link. */
  port: number;
  /** The path, with its slash, of a WebSocket. */
  path: string;
  /** The port of the session protocol over TCP. */
  sessionPort: number;
  ticket: string | null;
  node: Bytes | null;
  session: Bytes | null;
  agent: string | null;
  mode: "drive" | "watch" | null;
}

/** Returns the content of a share link or WebSocket address; unknown fields are ignored. Throws UsageError. */
export function parseLink(text: string): ParsedLink {
  const match = text.length <= LINK_MAX_CHARS ? LINK.exec(text) : null;
  if (match === null) {
    throw new UsageError(
      "This is no address: expected https://host:port/#…, sterna://host:port/… or wss://host:port/….",
    );
  }
  const [, scheme, host, portText, path, query, fragment] = match;
  const open = split(query ?? "");
  const secret = split(fragment ?? "");
  if (open.has("t"))
    throw new UsageError("The ticket of this link stands before the #, where servers log it: ask for a new link.");
  for (const key of open.keys())
    if (secret.has(key)) throw new UsageError("The share link says something twice: copy it again as a whole.");
  const fields = new Map([...open, ...secret]);
  const port = checkPort(portText === undefined ? DEFAULT_PORTS[scheme] : Number(portText));
  const mode = fields.get("m") ?? null;
  if (mode !== null && mode !== "drive" && mode !== "watch")
    throw new UsageError("The mode of a link is drive or watch.");
  const ticket = fields.get("t") ?? null;
  if (ticket !== null) secretField(ticket, 32, "ticket");
  return {
    scheme: scheme as ParsedLink["scheme"],
    host: host.replace(/^\[|\]$/g, ""),
    port,
    path: path ?? "/",
    sessionPort: fields.has("p") ? checkPort(Number(fields.get("p"))) : port,
    ticket,
    node: fields.has("n") ? secretField(fields.get("n")!, NODE_ID_BYTES, "node id") : null,
    session: fields.has("s") ? secretField(fields.get("s")!, UID_BYTES, "session") : null,
    agent: fields.get("a") ?? null,
    mode,
  };
}

function split(text: string): Map<string, string> {
  const fields = new Map<string, string>();
  const parts = text ? text.split("&") : [];
  for (const part of parts) {
    const match = FIELD.exec(part);
    if (match === null || fields.has(match[1]) || parts.length > LINK_FIELDS_MAX) {
      throw new UsageError("The share link is damaged or incomplete: copy it again as a whole.");
    }
    fields.set(match[1], match[2]);
  }
  return fields;
}

function secretField(text: string, size: number, what: string): Bytes {
  const data = fromBase64Url(text);
  if (data === null || data.length !== size) {
    throw new UsageError(`The ${what} in the share link is damaged or incomplete: copy it again as a whole.`);
  }
  return data;
}

function checkPort(port: number): number {
  if (!Number.isInteger(port) || port < 1 || port > 65_535) throw new UsageError("A port is a number from 1 to 65535.");
  return port;
}

/** Returns host and port as one text, IPv6 addresses in brackets. */
export function joined(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

const LETTERS = "abcdefghijklmnopqrstuvwxyz234567";

/** Returns a node id as people compare it: 13 groups of four letters and digits (base32). */
export function fingerprint(node: Uint8Array): string {
  let text = "";
  for (let bit = 0; bit < 52 * 5; bit += 5) {
    const word = ((node[bit >> 3] ?? 0) << 8) | (node[(bit >> 3) + 1] ?? 0);
    text += LETTERS[(word >> (11 - (bit & 7))) & 31];
  }
  return text.match(/.{4}/g)!.join("-");
}

/** Returns the node id that a text names: a fingerprint, 64 hexadecimal digits, or base64url. Throws UsageError. */
export function parseNodeId(text: string): Bytes {
  const coded = fromBase64Url(text);
  if (coded?.length === NODE_ID_BYTES) return coded;
  const plain = text.length <= 128 ? text.trim().toLowerCase().replace(/[-: ]/g, "") : "";
  const digits = plain.length === NODE_ID_BYTES * 2 ? fromHex(plain) : null;
  if (digits !== null) return digits;
  if (/^[a-z2-7]{52}$/.test(plain)) {
    const out = new Uint8Array(NODE_ID_BYTES + 1);
    for (let at = 0; at < 52; at++) {
      const word = LETTERS.indexOf(plain[at]) << (11 - ((at * 5) & 7));
      out[(at * 5) >> 3] |= word >> 8;
      if (((at * 5) >> 3) + 1 < out.length) out[((at * 5) >> 3) + 1] |= word & 0xff;
    }
    if (out[NODE_ID_BYTES] === 0 && fingerprint(out.subarray(0, NODE_ID_BYTES)).replaceAll("-", "") === plain) {
      return out.slice(0, NODE_ID_BYTES);
    }
  }
  throw new UsageError("That is no fingerprint of a node: use the 13 groups of four that `sterna info` shows.");
}

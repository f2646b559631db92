/** Small things about bytes that Node.js and browsers both need. */

/** Bytes that are not shared between threads, as the Web APIs want them. */
export type Bytes = Uint8Array<ArrayBuffer>;

/** Returns the parts as one array. */
export function concat(parts: readonly Uint8Array[]): Bytes {
  let size = 0;
  for (const part of parts) size += part.length;
  const out = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

/** Tells whether two arrays hold the same bytes. */
export function equal(left: Uint8Array, right: Uint8Array): boolean {
  return left.length === right.length && left.every((byte, at) => byte === right[at]);
}

/** Returns bytes in hexadecimal. */
export function toHex(data: Uint8Array): string {
  return Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Returns what hexadecimal digits stand for, or null if they are none. */
export function fromHex(text: string): Bytes | null {
  if (text.length % 2 || !/^[0-9a-fA-F]*$/.test(text)) return null;
  const out = new Uint8Array(text.length / 2);
  for (let at = 0; at < out.length; at++) out[at] = Number.parseInt(text.slice(at * 2, at * 2 + 2), 16);
  return out;
}

/** Returns a position as the eight bytes of a big-endian u64; exact up to 2^53 - 1. */
export function u64(value: number): Bytes {
  const out = new Uint8Array(8);
  new DataView(out.buffer).setBigUint64(0, BigInt(value));
  return out;
}

const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/** Returns bytes in base64url without padding (RFC 4648, section 5). */
export function toBase64Url(data: Uint8Array): string {
  let out = "";
  for (let at = 0; at < data.length; at += 3) {
    const left = data.length - at;
    const word = (data[at] << 16) | ((data[at + 1] ?? 0) << 8) | (data[at + 2] ?? 0);
    out += ALPHABET[word >> 18] + ALPHABET[(word >> 12) & 63];
    if (left > 1) out += ALPHABET[(word >> 6) & 63];
    if (left > 2) out += ALPHABET[word & 63];
  }
  return out;
}

/** Returns what base64url without padding stands for, or null if it is not exactly what `toBase64Url` gives. */
export function fromBase64Url(text: string): Bytes | null {
  if (text.length % 4 === 1 || !/^[A-Za-z0-9_-]*$/.test(text)) return null;
  const out = new Uint8Array(Math.floor((text.length * 3) / 4));
  let word = 0;
  let bits = 0;
  let at = 0;
  for (const letter of text) {
    word = ((word << 6) | ALPHABET.indexOf(letter)) & 0xffffff;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      out[at++] = (word >> bits) & 0xff;
    }
  }
  return toBase64Url(out) === text ? out : null;
}

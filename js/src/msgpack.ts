/** MessagePack, the part in use: nil, bool, int (64 bits), float, str, bin, array, map with str keys. */

import { concat } from "./bytes.js";
import { Code, ProtocolError } from "./errors.js";
import { PAYLOAD_MAX_BYTES, VALUE_DEPTH_MAX } from "./limits.js";

/** What a payload may hold; whole numbers beyond 2^53 - 1 are bigint, others number. */
export type Value = null | boolean | number | bigint | string | Uint8Array | Value[] | { [key: string]: Value };

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Returns a value as MessagePack, each number in its shortest form; keys that are undefined are left out. */
export function pack(value: unknown): Uint8Array<ArrayBuffer> {
  const parts: Uint8Array[] = [];
  write(value, parts, 0);
  return concat(parts);
}

function write(value: unknown, out: Uint8Array[], depth: number): void {
  if (depth > VALUE_DEPTH_MAX) throw new ProtocolError(Code.BAD_REQUEST, "a value is nested too deeply");
  if (value === null || value === undefined) out.push(Uint8Array.of(0xc0));
  else if (typeof value === "boolean") out.push(Uint8Array.of(value ? 0xc3 : 0xc2));
  else if (typeof value === "bigint") writeInteger(value, out);
  else if (typeof value === "number") writeNumber(value, out);
  else if (typeof value === "string") {
    const text = encoder.encode(value);
    if (text.length < 32) out.push(Uint8Array.of(0xa0 | text.length));
    else writeLength(text.length, [0xd9, 0xda, 0xdb], out);
    out.push(text);
  } else if (value instanceof Uint8Array) {
    writeLength(value.length, [0xc4, 0xc5, 0xc6], out);
    out.push(value);
  } else if (Array.isArray(value)) {
    if (value.length < 16) out.push(Uint8Array.of(0x90 | value.length));
    else writeLength(value.length, [-1, 0xdc, 0xdd], out);
    for (const item of value) write(item, out, depth + 1);
  } else if (typeof value === "object") {
    const entries = Object.entries(value).filter(([, item]) => item !== undefined);
    if (entries.length < 16) out.push(Uint8Array.of(0x80 | entries.length));
    else writeLength(entries.length, [-1, 0xde, 0xdf], out);
    for (const [key, item] of entries) {
      write(key, out, depth + 1);
      write(item, out, depth + 1);
    }
  } else throw new ProtocolError(Code.BAD_REQUEST, `a ${typeof value} cannot be sent`);
}

/** Writes a length behind the code for one, two or four bytes of it (-1: there is no such code). */
function writeLength(length: number, codes: readonly [number, number, number], out: Uint8Array[]): void {
  if (length < 0x100 && codes[0] >= 0) out.push(Uint8Array.of(codes[0], length));
  else if (length < 0x1_0000) out.push(Uint8Array.of(codes[1], length >> 8, length & 0xff));
  else {
    const head = new Uint8Array(5);
    head[0] = codes[2];
    new DataView(head.buffer).setUint32(1, length);
    out.push(head);
  }
}

function writeNumber(value: number, out: Uint8Array[]): void {
  if (Number.isSafeInteger(value)) {
    writeInteger(value, out);
    return;
  }
  const head = new Uint8Array(9);
  head[0] = 0xcb;
  new DataView(head.buffer).setFloat64(1, value);
  out.push(head);
}

function writeInteger(value: number | bigint, out: Uint8Array[]): void {
  if (value >= 0 ? value < 0x80 : value >= -0x20) {
    out.push(Uint8Array.of(Number(value) & 0xff));
    return;
  }
  const small = value >= -0x8000_0000 && value < 0x1_0000_0000;
  const head = new Uint8Array(9);
  const view = new DataView(head.buffer);
  if (!small) {
    const wide = BigInt(value);
    if (wide >= 1n << 64n || wide < -(1n << 63n)) throw new ProtocolError(Code.BAD_REQUEST, "a number is too large");
    head[0] = wide < 0n ? 0xd3 : 0xcf;
    view.setBigUint64(1, BigInt.asUintN(64, wide));
    out.push(head);
    return;
  }
  const number = Number(value);
  const step =
    number >= 0 ? (number < 0x100 ? 0 : number < 0x1_0000 ? 1 : 2) : number >= -0x80 ? 0 : number >= -0x8000 ? 1 : 2;
  head[0] = (number >= 0 ? 0xcc : 0xd0) + step;
  if (step === 0) view.setInt8(1, number);
  else if (step === 1) view.setInt16(1, number);
  else view.setInt32(1, number);
  out.push(head.subarray(0, 2 + [0, 1, 3][step]));
}

/**
 * Returns the one value that these bytes hold.
 *
 * Throws ProtocolError (`bad_payload`) for anything else: bytes left over, more than `limit` of them, text that is no
 * UTF-8, extension types, keys that are no text, more than 32 levels.
 */
export function unpack(data: Uint8Array, limit = PAYLOAD_MAX_BYTES): Value {
  if (data.length > limit) throw bad(`it has more than ${limit} bytes`);
  const reader = new Reader(data);
  const value = reader.value(0);
  if (reader.at !== data.length) throw bad("there are bytes after it");
  return value;
}

function bad(reason: string): ProtocolError {
  return new ProtocolError(Code.BAD_PAYLOAD, `a payload is not valid: ${reason}`);
}

class Reader {
  at = 0;
  private readonly view: DataView;

  constructor(private readonly data: Uint8Array) {
    this.view = new DataView(data.buffer, data.byteOffset, data.length);
  }

  value(depth: number): Value {
    if (depth > VALUE_DEPTH_MAX) throw bad("it is nested too deeply");
    const code = this.view.getUint8(this.take(1));
    if (code < 0x80) return code;
    if (code < 0x90) return this.map(code & 15, depth);
    if (code < 0xa0) return this.list(code & 15, depth);
    if (code < 0xc0) return this.text(code & 31);
    if (code >= 0xe0) return code - 0x100;
    switch (code) {
      case 0xc0:
        return null;
      case 0xc2:
        return false;
      case 0xc3:
        return true;
      case 0xc4:
      case 0xc5:
      case 0xc6:
        return this.bytes(this.length(code - 0xc4));
      case 0xca:
        return this.view.getFloat32(this.take(4));
      case 0xcb:
        return this.view.getFloat64(this.take(8));
      case 0xcc:
      case 0xcd:
      case 0xce:
        return this.length(code - 0xcc);
      case 0xcf:
        return narrow(this.view.getBigUint64(this.take(8)));
      case 0xd0:
        return this.view.getInt8(this.take(1));
      case 0xd1:
        return this.view.getInt16(this.take(2));
      case 0xd2:
        return this.view.getInt32(this.take(4));
      case 0xd3:
        return narrow(this.view.getBigInt64(this.take(8)));
      case 0xd9:
      case 0xda:
      case 0xdb:
        return this.text(this.length(code - 0xd9));
      case 0xdc:
      case 0xdd:
        return this.list(this.length(code - 0xdb), depth);
      case 0xde:
      case 0xdf:
        return this.map(this.length(code - 0xdd), depth);
      default:
        throw bad(`0x${code.toString(16)} begins nothing that is in use`);
    }
  }

  /** Counts `count` bytes as read and returns where they begin. */
  private take(count: number): number {
    const start = this.at;
    if (count > this.data.length - start) throw bad("it ends too early");
    this.at = start + count;
    return start;
  }

  private length(step: number): number {
    if (step === 0) return this.view.getUint8(this.take(1));
    return step === 1 ? this.view.getUint16(this.take(2)) : this.view.getUint32(this.take(4));
  }

  private bytes(length: number): Uint8Array {
    const start = this.take(length);
    const out = new Uint8Array(length);
    out.set(this.data.subarray(start, start + length));
    return out;
  }

  private text(length: number): string {
    const start = this.take(length);
    try {
      return decoder.decode(this.data.subarray(start, start + length));
    } catch {
      throw bad("a text is no UTF-8");
    }
  }

  private list(length: number, depth: number): Value[] {
    // Each item takes a byte at least: nothing is reserved for what cannot be there.
    if (length > this.data.length - this.at) throw bad("it ends too early");
    const out: Value[] = [];
    for (let left = length; left > 0; left--) out.push(this.value(depth + 1));
    return out;
  }

  private map(length: number, depth: number): { [key: string]: Value } {
    if (length * 2 > this.data.length - this.at) throw bad("it ends too early");
    const out: { [key: string]: Value } = {};
    for (let left = length; left > 0; left--) {
      const key = this.value(depth + 1);
      if (typeof key !== "string") throw bad("a key is no text");
      const value = this.value(depth + 1);
      // Not by assignment: `__proto__` is a key like any other.
      Object.defineProperty(out, key, { value, enumerable: true, configurable: true, writable: true });
    }
    return out;
  }
}

function narrow(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

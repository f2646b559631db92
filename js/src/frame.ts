/** The 15-byte header, the frame types and the incremental decoder (docs/protocol.md, section 1). */

import { crc16 } from "./crc16.js";
import { Code, ProtocolError } from "./errors.js";
import { CONTROL_MAX_BYTES, HEADER_BYTES, PAYLOAD_MAX_BYTES, PING_MAX_BYTES } from "./limits.js";

/** Frame types; those from 0x80 up may be ignored by who does not know them. */
export const Type = {
  CONNECT: 0x01,
  ACCEPT: 0x02,
  DATA: 0x03,
  SUSPEND: 0x04,
  RESUME: 0x05,
  RESUMED: 0x06,
  ACK: 0x07,
  PING: 0x08,
  PONG: 0x09,
  CLOSE: 0x0a,
  ERROR: 0x0b,
  RESIZE: 0x0c,
  SIGNAL: 0x0d,
  EOF: 0x0e,
  SNAPSHOT: 0x0f,
  CALL: 0x10,
  RESULT: 0x11,
  HELLO: 0x40,
  OPEN: 0x41,
  OPENED: 0x42,
  LANE: 0x43,
  FREEZE: 0x44,
  THAW: 0x45,
  SOUL: 0x46,
  READY: 0x47,
  EXIT: 0x48,
  CAPTURE: 0x49,
  AUDIENCE: 0x4a,
  ROAM: 0x50,
  EVENT: 0x80,
} as const;

const MAGIC = 0x434c;
const OPTIONAL_FROM = 0x80;
const TWO_32 = 0x1_0000_0000;
const HALF = 0x8000_0000;

const LARGE: readonly number[] = [Type.DATA, Type.SNAPSHOT, Type.RESULT, Type.SOUL, Type.OPENED];
/** The most payload bytes that each type may carry; what is not named here is ignored unread. */
export const PAYLOAD_LIMITS_BYTES: ReadonlyMap<number, number> = new Map([
  ...Object.values(Type).map((type): [number, number] => [
    type,
    LARGE.includes(type) ? PAYLOAD_MAX_BYTES : CONTROL_MAX_BYTES,
  ]),
  [Type.PING, PING_MAX_BYTES],
  [Type.PONG, PING_MAX_BYTES],
  [Type.ACK, 8],
  [Type.EOF, 0],
]);

/** One frame; `seq` is the header's low 32 bits. */
export interface Frame {
  type: number;
  handle: number;
  seq: number;
  payload: Uint8Array<ArrayBuffer>;
}

const EMPTY = new Uint8Array(0);

/** Returns a whole frame as bytes; of a position only the low 32 bits travel. */
export function encodeFrame(
  type: number,
  handle: number,
  position = 0,
  payload: Uint8Array = EMPTY,
): Uint8Array<ArrayBuffer> {
  const limit = PAYLOAD_LIMITS_BYTES.get(type) ?? PAYLOAD_MAX_BYTES;
  if (payload.length > limit) {
    throw new ProtocolError(Code.TOO_LARGE, `${payload.length} bytes are too many for frame type 0x${hex(type)}`);
  }
  const out = new Uint8Array(HEADER_BYTES + payload.length);
  const view = new DataView(out.buffer);
  view.setUint16(0, MAGIC);
  view.setUint8(2, type);
  view.setUint32(3, handle);
  view.setUint32(7, position % TWO_32);
  view.setUint16(11, payload.length);
  out.set(payload, HEADER_BYTES);
  view.setUint16(13, crc16(payload, crc16(out, 0, 0, 13)));
  return out;
}

/**
 * Returns the position that has these low 32 bits and lies nearest to `near`; exactly half-way counts as behind.
 *
 * Positions are numbers, exact up to 2^53 - 1 (8 PiB of one session's bytes); larger ones are refused where messages
 * are read. The result is negative when the nearest one would lie before 0, which no honest peer sends.
 */
export function expand(low: number, near: number): number {
  const ahead = (low - (near % TWO_32) + TWO_32) % TWO_32;
  return ahead >= HALF ? near + ahead - TWO_32 : near + ahead;
}

/**
 * Turns bytes into frames, the same for any split of the bytes; after the first fault it takes nothing more.
 *
 * It holds at most one partial frame (65,550 bytes). `fault` is the code of what was wrong with the peer's bytes.
 */
export class Decoder {
  fault: number | null = null;
  reason = "";
  private readonly rest = new Uint8Array(HEADER_BYTES + PAYLOAD_MAX_BYTES);
  private held = 0;

  /** The number of bytes held of a frame that is not whole yet. */
  get waiting(): number {
    return this.held;
  }

  /** Returns the frames that these bytes complete; a fault ends the list and sets `fault`. */
  feed(data: Uint8Array): Frame[] {
    const frames: Frame[] = [];
    let at = 0;
    // Only as much is copied as the frame in hand needs; whole frames are then read from where they came.
    while (this.held && this.fault === null) {
      const want = this.held < HEADER_BYTES ? HEADER_BYTES : HEADER_BYTES + ((this.rest[11] << 8) | this.rest[12]);
      const taken = Math.min(want - this.held, data.length - at);
      this.rest.set(data.subarray(at, at + taken), this.held);
      this.held += taken;
      at += taken;
      const used = this.one(this.rest, 0, this.held, frames);
      if (used) this.held = 0;
      else if (at === data.length && this.held < this.wanted()) return frames;
    }
    while (this.fault === null && at < data.length) {
      const used = this.one(data, at, data.length, frames);
      if (!used) break;
      at += used;
    }
    if (this.fault !== null) this.held = 0;
    else if (at < data.length) {
      this.rest.set(data.subarray(at), 0);
      this.held = data.length - at;
    }
    return frames;
  }

  /** Notes the end of the bytes; a fault if it comes inside a frame. */
  eof(): void {
    if (this.held && this.fault === null) this.fail(Code.TRUNCATED, "the connection ended inside a frame");
  }

  private wanted(): number {
    return this.held < HEADER_BYTES ? HEADER_BYTES : HEADER_BYTES + ((this.rest[11] << 8) | this.rest[12]);
  }

  /** Reads one frame from `data` between `at` and `end`; returns how many bytes it takes, 0 if it is not whole. */
  private one(data: Uint8Array, at: number, end: number, frames: Frame[]): number {
    if (end - at < HEADER_BYTES) return 0;
    const view = new DataView(data.buffer, data.byteOffset + at, HEADER_BYTES);
    if (view.getUint16(0) !== MAGIC) return this.fail(Code.BAD_MAGIC, "a frame does not begin with CL");
    const type = view.getUint8(2);
    const length = view.getUint16(11);
    const limit = PAYLOAD_LIMITS_BYTES.get(type);
    if (limit === undefined) {
      if (type < OPTIONAL_FROM) return this.fail(Code.UNKNOWN_TYPE, `frame type 0x${hex(type)} is unknown`);
    } else if (length > limit) {
      return this.fail(Code.TOO_LARGE, `${length} bytes are too many for frame type 0x${hex(type)}`);
    }
    const size = HEADER_BYTES + length;
    if (end - at < size) return 0;
    const payload = new Uint8Array(length); // not slice(): that of a Node.js Buffer is no copy
    payload.set(data.subarray(at + HEADER_BYTES, at + size));
    if (crc16(payload, crc16(data, 0, at, at + 13)) !== view.getUint16(13)) {
      return this.fail(Code.BAD_CRC, `the checksum of a frame of type 0x${hex(type)} is wrong`);
    }
    if (limit !== undefined) frames.push({ type, handle: view.getUint32(3), seq: view.getUint32(7), payload });
    return size;
  }

  private fail(code: number, reason: string): 0 {
    this.fault = code;
    this.reason = reason;
    this.held = 0;
    return 0;
  }
}

function hex(type: number): string {
  return type.toString(16).padStart(2, "0");
}

/** The reliable stream: positions, acknowledgement and window (docs/protocol.md, section 2). Times in milliseconds. */

import { Code, ProtocolError } from "./errors.js";
import { expand, Type } from "./frame.js";
import { ACK_DELAY_MS, ACK_EVERY_BYTES, ACK_JOIN_MS, CHUNK_BYTES, WINDOW_BYTES } from "./limits.js";

/** A piece of a stream: DATA, or a mark (SIGNAL, EOF) that takes one position. */
export interface Item {
  type: number;
  position: number;
  payload: Uint8Array;
}

function span(item: Item): number {
  return item.type === Type.DATA ? item.payload.length : 1;
}

/**
 * Keeps what is not acknowledged and says what to send next.
 *
 * `base` is the first position not acknowledged, `sent` the next one to send, `end` the next one to write; `window`
 * bounds `end - base`, so memory is bounded.
 */
export class SendStream {
  base: number;
  sent: number;
  end: number;
  private items: Item[] = [];
  /** Index of the first item that holds unsent bytes. */
  private next = 0;
  /** The furthest ever sent, on this connection or an earlier one. */
  private top: number;

  constructor(
    start = 0,
    readonly window = WINDOW_BYTES,
    private readonly chunk = CHUNK_BYTES,
  ) {
    this.base = this.sent = this.end = this.top = start;
  }

  /** How many positions may be written now. */
  get room(): number {
    return this.base + this.window - this.end;
  }

  /** Takes (and copies) the first bytes that fit into the window; returns how many. */
  write(data: Uint8Array): number {
    const taken = Math.max(Math.min(data.length, this.room), 0);
    for (let at = 0; at < taken; at += this.chunk) {
      const payload = Uint8Array.prototype.slice.call(data, at, Math.min(at + this.chunk, taken));
      this.items.push({ type: Type.DATA, position: this.end, payload });
      this.end += payload.length;
    }
    return taken;
  }

  /** Writes a mark (SIGNAL or EOF); false when the window is full. */
  mark(type: number, payload: Uint8Array = new Uint8Array(0)): boolean {
    if (this.room < 1) return false;
    this.items.push({ type, position: this.end, payload });
    this.end += 1;
    return true;
  }

  /** Returns what is to be sent now, and counts it as sent. */
  take(): Item[] {
    const out: Item[] = [];
    for (; this.next < this.items.length; this.next++) {
      const item = this.items[this.next];
      const skip = Math.max(this.sent - item.position, 0);
      const rest = skip ? { ...item, position: this.sent, payload: item.payload.subarray(skip) } : item;
      out.push(rest);
      this.sent = rest.position + span(rest);
    }
    this.top = Math.max(this.top, this.sent);
    return out;
  }

  /**
   * Forgets everything before `position`; returns how many positions that were.
   *
   * What an earlier connection carried may be acknowledged after `rewind`, before it was sent again; then it is not.
   * Throws ProtocolError (`protocol`) for a position never sent; an old one changes nothing.
   */
  acknowledge(position: number): number {
    if (position > this.top) {
      throw new ProtocolError(Code.PROTOCOL, `position ${position} was acknowledged but only ${this.top} were sent`);
    }
    const gained = position - this.base;
    if (gained <= 0) return 0;
    let done = 0;
    for (; done < this.items.length; done++) {
      const item = this.items[done];
      if (item.position + span(item) > position) {
        if (item.position < position) {
          this.items[done] = { ...item, position, payload: item.payload.subarray(position - item.position) };
        }
        break;
      }
    }
    this.items.splice(0, done);
    this.next = Math.max(this.next - done, 0);
    this.base = position;
    this.sent = Math.max(this.sent, position);
    return gained;
  }

  /**
   * Sends again from `position`, the receiver's next byte wanted; what lies before it counts as acknowledged.
   *
   * Throws ProtocolError (`gap`) when the receiver wants bytes that were acknowledged long ago, or never written.
   */
  rewind(position: number): void {
    if (position < this.base || position > this.end) {
      throw new ProtocolError(
        Code.GAP,
        `position ${position} is wanted but only ${this.base} to ${this.end} are there`,
      );
    }
    this.top = Math.max(this.top, position);
    this.acknowledge(position);
    this.sent = position;
    this.next = 0;
  }
}

/**
 * The receiving half: delivers in order, drops what it has, and says when to acknowledge.
 *
 * `next` is the position wanted next, `handled` how far the caller has really dealt with it, `acked` what the peer was
 * told. An acknowledgement is lazy: after 64 KiB at once, else after 250 ms, or, once 100 ms old, with data.
 */
export class Intake {
  next: number;
  handled: number;
  acked: number;
  private since = -1;

  constructor(start = 0) {
    this.next = this.handled = this.acked = start;
  }

  /** Returns what is new of this DATA, null when all of it was had before; throws `gap` when bytes are missing. */
  receive(seq: number, payload: Uint8Array): Uint8Array | null {
    const want = this.next;
    const position = expand(seq, want);
    if (position > want) throw new ProtocolError(Code.GAP, `bytes ${want} to ${position} are missing`);
    const end = position + payload.length;
    if (end <= want) return null;
    if (end > Number.MAX_SAFE_INTEGER) throw new ProtocolError(Code.LIMIT, "a session has at most 2^53 - 1 bytes");
    this.next = end;
    return payload.subarray(want - position);
  }

  /** Notes that everything before `position` is dealt with. */
  handle(position: number, now: number): void {
    if (position > this.handled) {
      this.handled = position;
      if (this.since < 0) this.since = now;
    }
  }

  /** Returns the position to acknowledge now, or null; `joining` says that data goes to the peer anyway. */
  acknowledgement(now: number, joining: boolean): number | null {
    if (this.since < 0) return null;
    const age = now - this.since;
    const due = age >= ACK_DELAY_MS || this.handled - this.acked >= ACK_EVERY_BYTES || (joining && age >= ACK_JOIN_MS);
    if (!due) return null;
    this.since = -1;
    this.acked = this.handled;
    return this.handled;
  }

  /** Returns when an acknowledgement is due by itself, or null. */
  timeout(): number | null {
    return this.since >= 0 ? this.since + ACK_DELAY_MS : null;
  }

  /** Notes that the peer learnt `position` in another way (RESUME). */
  told(position: number): void {
    this.acked = Math.max(this.acked, position);
    if (this.acked >= this.handled) this.since = -1;
  }

  /** Goes on at `position`: a gap was announced, or a snapshot stands for the bytes before it. */
  skip(position: number): void {
    this.next = this.handled = this.acked = position;
    this.since = -1;
  }
}

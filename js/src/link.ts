/** One connection's frames, both ways: decoding, queueing, and the closing ERROR (docs/protocol.md, section 1). */

import { codeName } from "./errors.js";
import { Decoder, encodeFrame, type Frame } from "./frame.js";
import { pack } from "./msgpack.js";

/** A connection as the core sees it: frames in, whole frames out; no socket. */
export class Link {
  /** Whether the connection shall be closed once everything is sent. */
  closing = false;
  private readonly decoder = new Decoder();
  private out: Uint8Array[] = [];

  /** Returns the frames these bytes complete. */
  receive(data: Uint8Array): Frame[] {
    return this.decoder.feed(data);
  }

  /** Queues the closing ERROR if the last bytes were broken; called after their good frames were dealt with. */
  check(): void {
    const { fault, reason } = this.decoder;
    if (fault !== null && !this.closing) this.fail(fault, `${reason[0].toUpperCase()}${reason.slice(1)}.`);
  }

  /** Queues one frame. */
  send(type: number, handle: number, position = 0, payload?: Uint8Array): void {
    if (!this.closing) this.out.push(encodeFrame(type, handle, position, payload));
  }

  /** Queues one control frame. */
  sendMessage(type: number, handle: number, message: object): void {
    this.send(type, handle, 0, pack(message));
  }

  /** Queues an ERROR on session 0 and closes the connection after it. */
  fail(code: number, message: string): void {
    this.sendMessage(0x0b, 0, { code, name: codeName(code), message });
    this.closing = true;
  }

  /** Whether there is something to send. */
  get pending(): boolean {
    return this.out.length > 0;
  }

  /** Returns the queued frames, which are to be sent in this order, and forgets them. */
  dataToSend(): Uint8Array[] {
    const out = this.out;
    this.out = [];
    return out;
  }
}

/** Connections over WebSockets: binary messages of whole frames, subprotocol `clawterm.v1`. */

import { concat } from "./bytes.js";
import { Code, ConnectionLostError, SternaError } from "./errors.js";
import type { Hears, Place, Target, Wire } from "./platform.js";

export const SUBPROTOCOL = "clawterm.v1";
const MESSAGE_BYTES = 128 * 1024;

/**
 * Returns a node behind a WebSocket. Browsers open WebSockets to one host one after another and say nothing of why one
 * failed, so few race each other.
 */
export function webSocketTarget(place: Place, node: Uint8Array<ArrayBuffer>): Target {
  if (typeof globalThis.WebSocket !== "function") {
    throw new SternaError(
      Code.UNSUPPORTED,
      "There is no WebSocket here: Node.js has it since version 22; use host and port.",
    );
  }
  return {
    name: new URL(place.url).host,
    node,
    pacing: { everyMs: 500, openMax: 3, slowing: true },
    dial: (hears) => new SocketWire(place.url, hears),
  };
}

class SocketWire implements Wire {
  private readonly socket: WebSocket;
  private opened = false;
  private over = false;

  constructor(url: string, hears: Hears) {
    const socket = new WebSocket(url, [SUBPROTOCOL]);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      if (this.over) return;
      if (socket.protocol !== SUBPROTOCOL) {
        this.close();
        const text = `What answers at ${socket.url} does not speak ${SUBPROTOCOL}.`;
        hears.failed(new SternaError(Code.UNSUPPORTED, text), { refused: true, fatal: true });
        return;
      }
      this.opened = true;
      hears.open();
    };
    socket.onmessage = (event) => {
      if (this.over) return;
      if (event.data instanceof ArrayBuffer) hears.data(new Uint8Array(event.data));
      else {
        this.close();
        hears.ended("the node sent text");
      }
    };
    socket.onclose = (event) => {
      if (this.over) return;
      this.over = true;
      if (this.opened) hears.ended(event.reason || "the connection ended");
      else
        hears.failed(new ConnectionLostError(`The node at ${new URL(url).host} cannot be reached.`), { refused: true });
    };
    socket.onerror = () => undefined; // `close` follows
  }

  send(frames: Uint8Array[]): void {
    if (this.socket.readyState !== 1) return;
    let group: Uint8Array[] = [];
    let size = 0;
    for (const frame of frames) {
      if (size + frame.length > MESSAGE_BYTES && size) {
        this.socket.send(concat(group));
        group = [];
        size = 0;
      }
      group.push(frame);
      size += frame.length;
    }
    if (size) this.socket.send(concat(group));
  }

  close(): void {
    if (this.over) return;
    this.over = true;
    this.socket.close();
  }
}

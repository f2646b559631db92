/** What Node.js and browsers do differently: one small interface. */

import type { Bytes } from "./bytes.js";
import type { DeviceStorage } from "./device.js";
import type { SternaError } from "./errors.js";
import type { Pacing } from "./machine.js";

/** Where a node is: over TCP with TLS, or a WebSocket. */
export interface Place {
  transport: "tls" | "websocket";
  host: string;
  port: number;
  /** The WebSocket's whole address. */
  url: string;
}

/** A node that can be dialled: its id is known. */
export interface Target {
  name: string;
  node: Bytes;
  pacing: Pacing;
  /** Opens a connection; what becomes of it is told to `hears`, never before this call has returned. */
  dial(hears: Hears): Wire;
}

/** Hears what becomes of a connection; nothing after `ended`, nor after `close`. */
export interface Hears {
  /** TCP took it; who is there, is still to be proved. */
  reached(): void;
  /** It is open and the other side is the node. */
  open(): void;
  data(data: Uint8Array): void;
  /** It could not be opened; `refused`: nobody listens there; `fatal`: trying again is no use. */
  failed(error: SternaError, options: { refused: boolean; fatal?: boolean }): void;
  /** It was open and is gone. */
  ended(reason: string): void;
}

/** One connection. */
export interface Wire {
  /** Sends whole frames. */
  send(frames: Uint8Array[]): void;
  /** Ends it after what was sent; nothing is heard of it any more. */
  close(): void;
}

/** One kind of place to run in. */
export interface Platform {
  /** The transport of an address that does not name one, and of share links. */
  readonly transport: "tls" | "websocket";
  /** Returns the storage that `spec` names: a directory in Node.js, a database's name in a browser. */
  storage(spec: string | undefined): Promise<DeviceStorage>;
  /** Returns the node at a place: the `expected` one, or one that is known there or met. */
  find(place: Place, expected: Bytes | null, storage: DeviceStorage): Promise<Target>;
  /** Calls back when the network may have changed; returns what ends that. */
  watch(changed: (reason: string) => void): () => void;
  /** Returns what this installation calls itself when the caller does not say. */
  label(): string;
}

/** Returns random bytes, in every platform alike. */
export function random(count: number): Bytes {
  return globalThis.crypto.getRandomValues(new Uint8Array(count));
}

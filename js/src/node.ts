/** The entry point for Node.js. */

import { node } from "./platform-node.js";
import type { Caller } from "./caller.js";
import { callerWith, type ConnectOptions, connectWith, type Session } from "./session.js";

export * from "./api.js";
export { DirectoryStorage } from "./platform-node.js";
export { node as platform };

/** Connects to a session over TCP and TLS, or a WebSocket; resolves once it is there. */
export function connect(options: ConnectOptions): Promise<Session> {
  return connectWith(node, options);
}

/** Returns what asks a node questions without joining a session; it connects with the first one. */
export function connectCaller(options: ConnectOptions): Promise<Caller> {
  return callerWith(node, options);
}

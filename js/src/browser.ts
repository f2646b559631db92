/** The entry point for browsers. */

import { browser } from "./platform-browser.js";
import type { Caller } from "./caller.js";
import { callerWith, type ConnectOptions, connectWith, type Session } from "./session.js";

export * from "./api.js";
export { IndexedStorage } from "./platform-browser.js";
export { browser as platform };

/** Connects to a session by WebSocket; resolves once it is there. */
export function connect(options: ConnectOptions): Promise<Session> {
  return connectWith(browser, options);
}

/** Returns what asks a node questions without joining a session; it connects with the first one. */
export function connectCaller(options: ConnectOptions): Promise<Caller> {
  return callerWith(browser, options);
}

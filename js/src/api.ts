/** What both entry points have in common. */

export {
  Code,
  codeName,
  ConnectionLostError,
  ProtocolError,
  RefusedError,
  SternaError,
  TrustError,
  UsageError,
} from "./errors.js";
export type { Caller } from "./caller.js";
export { type DeviceKey, type DeviceStorage, MemoryStorage } from "./device.js";
export { fingerprint, parseLink, parseNodeId, type ParsedLink } from "./links.js";
export type { Place, Platform } from "./platform.js";
export { type ConnectOptions, Session, type SessionEvents, type SessionState, WEBSOCKET_PATH } from "./session.js";

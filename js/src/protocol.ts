/** The protocol without any platform: frames, MessagePack, messages, streams and the session machine. */

export { crc16 } from "./crc16.js";
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
export { Decoder, encodeFrame, expand, type Frame, PAYLOAD_LIMITS_BYTES, Type } from "./frame.js";
export * as limits from "./limits.js";
export { Link } from "./link.js";
export { type Action, ClientMachine, type Identity, type MachineEvent, type Pacing, type Wish } from "./machine.js";
export * as messages from "./messages.js";
export { pack, unpack, type Value } from "./msgpack.js";
export { Race, Vitals } from "./race.js";
export { Intake, SendStream } from "./stream.js";
export { decompress } from "./zstd.js";

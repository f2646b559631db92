/** The control payloads: MessagePack maps, typed, unknown keys ignored (docs/protocol.md, section 6). */

import { Code, ProtocolError } from "./errors.js";
import { Type } from "./frame.js";
import { POSITION_MAX, TEXT_SHOWN_MAX_CHARS } from "./limits.js";
import { pack, unpack, type Value } from "./msgpack.js";

export const CONTEXT_CONNECT = "clawterm/1 CONNECT";
export const CONTEXT_RESUME = "clawterm/1 RESUME";

interface Field<T> {
  read(value: Value): T;
  /** What a key that is left out stands for; without it the key must be there. */
  missing?: () => T;
}

type Fields = { [key: string]: Field<unknown> };
type Read<F extends Fields> = { [K in keyof F]: F[K] extends Field<infer T> ? T : never };

/** The shape of one message: its name and its fields. */
export interface Shape<M> {
  readonly name: string;
  read(value: Value): M;
}

/** What a shape's messages look like once read. */
export type Message<S> = S extends Shape<infer M> ? M : never;

class Unfit extends Error {}

function shape<F extends Fields>(name: string, fields: F): Shape<Read<F>> {
  const entries = Object.entries(fields);
  return {
    name,
    read(value) {
      if (typeof value !== "object" || value === null || Array.isArray(value) || value instanceof Uint8Array) {
        throw new Unfit("a map was expected");
      }
      const out: { [key: string]: unknown } = {};
      for (const [key, field] of entries) {
        if (Object.hasOwn(value, key)) {
          try {
            out[key] = field.read(value[key]);
          } catch (error) {
            throw error instanceof Unfit ? new Unfit(`${key}: ${error.message}`) : error;
          }
        } else if (field.missing !== undefined) out[key] = field.missing();
        else throw new Unfit(`${key} is missing`);
      }
      return out as Read<F>;
    },
  };
}

function field<T>(what: string, fits: (value: Value) => boolean): Field<T> {
  return {
    read(value) {
      if (!fits(value)) throw new Unfit(`${what} was expected`);
      return value as T;
    },
  };
}

const str = field<string>("text", (v) => typeof v === "string");
const bin = field<Uint8Array>("bytes", (v) => v instanceof Uint8Array);
const bool = field<boolean>("true or false", (v) => typeof v === "boolean");
const int = field<number>("a whole number", (v) => Number.isSafeInteger(v));
const float = field<number>("a number", (v) => typeof v === "number");
const any = field<Value>("a value", () => true);
/** A position: a number, so one beyond 2^53 - 1 (8 PiB) is refused; nobody sends as much through a session. */
const position = field<number>("a position from 0 to 2^53 - 1", (v) => Number.isSafeInteger(v) && Number(v) >= 0);
/** A number that may be as large as 2^63 - 1 and is only passed on: a log's, an epoch, a counter. */
const u63: Field<bigint> = {
  read(value) {
    if (typeof value !== "bigint" && !Number.isSafeInteger(value)) throw new Unfit("a whole number was expected");
    const wide = BigInt(value as bigint | number);
    if (wide < 0n || wide > POSITION_MAX) throw new Unfit("a number from 0 to 2^63 - 1 was expected");
    return wide;
  },
};
const wide: Field<bigint> = {
  read(value) {
    if (typeof value !== "bigint" && !Number.isSafeInteger(value)) throw new Unfit("a whole number was expected");
    return BigInt(value as bigint | number);
  },
};

function optional<T, D extends T>(inner: Field<T>, value: D): Field<T> {
  return { read: inner.read, missing: () => value };
}

function nullable<T>(inner: Field<T>): Field<T | null> {
  return { read: (value) => (value === null ? null : inner.read(value)), missing: () => null };
}

function oneOf<T extends string>(...values: readonly T[]): Field<T> {
  return field<T>(values.join(" or "), (v) => values.includes(v as T));
}

function list<T>(inner: Field<T>): Field<T[]> {
  return {
    read(value) {
      if (!Array.isArray(value)) throw new Unfit("a list was expected");
      return value.map((item) => inner.read(item));
    },
    missing: () => [],
  };
}

const texts: Field<{ [key: string]: string }> = {
  read(value) {
    if (typeof value !== "object" || value === null || Array.isArray(value) || value instanceof Uint8Array) {
      throw new Unfit("a map was expected");
    }
    for (const item of Object.values(value)) str.read(item);
    return value as { [key: string]: string };
  },
  missing: () => ({}),
};

const kind = oneOf("pty", "chat", "stream");
const mode = optional(oneOf("drive", "watch"), "drive");
const cells = { cols: optional(int, 80), rows: optional(int, 24) };
const versions = { min: optional(int, 1), max: optional(int, 1), features: list(str) };
const start = { argv: nullable(list(str)), cwd: nullable(str), env: texts };

export const Signed = shape("Signed", { body: bin, sig: bin });
export const ConnectBody = shape("ConnectBody", {
  context: str,
  node: bin,
  request: bin,
  key: bin,
  attachment: bin,
  credential: str,
  tenant: optional(str, ""),
  agent: optional(str, ""),
  want: optional(oneOf("latest", "named", "new", "join", "call"), "latest"),
  ...versions,
  name: nullable(str),
  uid: nullable(bin),
  label: optional(str, ""),
  mode,
  exact: optional(bool, false),
  displace: optional(bool, false),
  output: nullable(position),
  ...cells,
  term: optional(str, ""),
  ...start,
});
export const ResumeBody = shape("ResumeBody", {
  context: str,
  node: bin,
  uid: bin,
  device: bin,
  attachment: bin,
  race: bin,
  counter: u63,
  epoch: u63,
  log: u63,
  output: position,
  sent: optional(position, 0),
  handled: nullable(position),
  ...cells,
  ...versions,
});
export const Accept = shape("Accept", {
  uid: bin,
  log: u63,
  kind,
  epoch: u63,
  node: bin,
  name: str,
  agent: str,
  output: position,
  input: position,
  window: position,
  keepalive: int,
  features: list(str),
  created: optional(bool, false),
  snapshot: optional(bool, false),
  mode,
  state: optional(str, "active"),
  head: optional(position, 0),
  quic: optional(int, 0),
});
export const Lost = shape("Lost", { start: position, end: position });
export const Resumed = shape("Resumed", {
  epoch: u63,
  log: u63,
  output: position,
  input: nullable(position),
  lost: nullable(Lost),
  snapshot: optional(bool, false),
  state: optional(str, "active"),
  head: optional(position, 0),
  forgotten: optional(bool, false),
});
export const Close = shape("Close", {
  code: optional(int, 0),
  reason: optional(str, ""),
  status: nullable(int),
  signal: nullable(int),
  output: nullable(position),
});
export const ErrorMessage = shape("Error", {
  code: int,
  name: str,
  message: str,
  retry_after: nullable(float),
  address: nullable(str),
  value: nullable(wide),
});
export const Suspend = shape("Suspend", { position: optional(position, 0) });
export const Resize = shape("Resize", { cols: int, rows: int });
export const Signal = shape("Signal", { name: str });
export const Snapshot = shape("Snapshot", {
  position,
  part: optional(int, 0),
  last: optional(bool, true),
  zstd: optional(bool, false),
  data: optional(bin, new Uint8Array(0)),
  lost: nullable(Lost),
  token: optional(int, 0),
});
export const Call = shape("Call", { id: int, method: str, params: { read: any.read, missing: (): Value => ({}) } });
export const Result = shape("Result", {
  id: int,
  value: { read: any.read, missing: (): Value => null },
  error: nullable(ErrorMessage),
  more: optional(bool, false),
});
export const Event = shape("Event", {
  kind: str,
  label: optional(str, ""),
  device: optional(str, ""),
  start: nullable(position),
  end: nullable(position),
  status: nullable(int),
  count: nullable(int),
});
export const Hello = shape("Hello", {
  version: int,
  kind,
  instance: bin,
  features: list(str),
  label: optional(str, ""),
});
export const LaneState = shape("LaneState", { attachment: bin, next: position });
export const Open = shape("Open", {
  uid: bin,
  journalled: position,
  fresh: optional(bool, false),
  ...cells,
  term: optional(str, ""),
  name: optional(str, ""),
  ...start,
});
export const Opened = shape("Opened", {
  next: position,
  base: position,
  lanes: list(LaneState),
  cols: optional(int, 0),
  rows: optional(int, 0),
  error: nullable(ErrorMessage),
});
export const Lane = shape("Lane", { uid: bin, attachment: bin, next: optional(position, 0) });
export const Exit = shape("Exit", {
  position,
  status: nullable(int),
  signal: nullable(int),
  lanes: list(LaneState),
});
export const Capture = shape("Capture", { token: int, scrollback: optional(bool, true) });
export const Audience = shape("Audience", { terminals: int });

export type Accept = Message<typeof Accept>;
export type Resumed = Message<typeof Resumed>;
export type Close = Message<typeof Close>;
export type ErrorMessage = Message<typeof ErrorMessage>;
export type Event = Message<typeof Event>;
export type Lost = Message<typeof Lost>;
export type Snapshot = Message<typeof Snapshot>;
export type ConnectBody = Message<typeof ConnectBody>;

/** The payload's shape of every frame type that has one. */
export const MESSAGES: ReadonlyMap<number, Shape<unknown>> = new Map<number, Shape<unknown>>([
  [Type.CONNECT, Signed],
  [Type.ACCEPT, Accept],
  [Type.SUSPEND, Suspend],
  [Type.RESUME, Signed],
  [Type.RESUMED, Resumed],
  [Type.CLOSE, Close],
  [Type.ERROR, ErrorMessage],
  [Type.RESIZE, Resize],
  [Type.SIGNAL, Signal],
  [Type.SNAPSHOT, Snapshot],
  [Type.CALL, Call],
  [Type.RESULT, Result],
  [Type.HELLO, Hello],
  [Type.OPEN, Open],
  [Type.OPENED, Opened],
  [Type.LANE, Lane],
  [Type.EXIT, Exit],
  [Type.CAPTURE, Capture],
  [Type.AUDIENCE, Audience],
  [Type.EVENT, Event],
]);

/** Returns the payload as `shape`; throws ProtocolError (`bad_payload`) when it is none. */
export function parse<M>(shape: Shape<M>, payload: Uint8Array): M {
  try {
    return shape.read(unpack(payload));
  } catch (error) {
    if (!(error instanceof Unfit)) throw error;
    throw new ProtocolError(Code.BAD_PAYLOAD, `a ${shape.name} payload is not valid: ${clean(error.message)}`);
  }
}

/** Returns the payload as `parse` does, with texts that may be shown, whoever sent them. */
export function parseShown<M>(shape: Shape<M>, payload: Uint8Array): M {
  return shown(parse(shape, payload));
}

/** Returns a plain value with all texts in it as they may be shown: no control characters, of bounded length. */
export function shown<T>(value: T): T {
  if (typeof value === "string") return clean(value) as T;
  if (Array.isArray(value)) return value.map(shown) as T;
  if (typeof value === "object" && value !== null && !(value instanceof Uint8Array)) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [clean(key), shown(item)])) as T;
  }
  return value;
}

/** Returns a text without control and formatting characters and separators other than the space. */
export function clean(text: string, limit = TEXT_SHOWN_MAX_CHARS): string {
  const kept = text.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, "");
  return Array.from(kept.slice(0, limit * 2))
    .slice(0, limit)
    .join("");
}

export { pack };

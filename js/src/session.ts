/** `connect(…)` and `Session`: one attachment to a session, through any failure of the network. */

import { Caller } from "./caller.js";
import { Code, RefusedError, SternaError, UsageError } from "./errors.js";
import { type Bytes, fromHex, toHex } from "./bytes.js";
import { type DeviceKey, type DeviceStorage, toSign, wallNs } from "./device.js";
import { joined, parseLink, parseNodeId, type ParsedLink } from "./links.js";
import { EVENTS_KEPT_MAX } from "./limits.js";
import { ClientMachine, type MachineEvent, type Wish } from "./machine.js";
import { type Accept, clean, type Close } from "./messages.js";
import { type Hears, type Place, type Platform, random, type Target, type Wire } from "./platform.js";
import { decompress } from "./zstd.js";

/** The path of a node's WebSocket, where an address does not name another. */
export const WEBSOCKET_PATH = "/ws";
/** The port of a node's web page and WebSocket. */
export const WEB_PORT = 7222;
/** The port of the session protocol over TCP. */
export const SESSION_PORT = 7220;

/** What to connect to, and as what. */
export interface ConnectOptions {
  /** A share link (`https://…#…`, `sterna://…`) or a WebSocket's address (`wss://…`); else `host` and `port`. */
  url?: string;
  host?: string;
  port?: number;
  /** The node's id: 32 bytes, or a fingerprint. A share link names it; without either Node.js trusts on first use. */
  node?: Uint8Array | string;
  /** What lets us in, if the link does not say: a one-time share ticket or an access token. */
  ticket?: string;
  token?: string;
  agent?: string;
  /** The session to join: its uid (16 bytes, or 32 hexadecimal digits), or its name. */
  session?: Uint8Array | string;
  /** The session's name. With `create` (which is assumed where an agent is named) it is made if absent. */
  name?: string;
  /** With a name: make it if absent; with only an agent: always a new session (else the agent's latest one). */
  create?: boolean;
  mode?: "drive" | "watch";
  cols?: number;
  rows?: number;
  /** The kind of terminal ($TERM); empty where there is none. */
  term?: string;
  /** What others are told that we are. */
  label?: string;
  /** Every byte from position `output` on, or the oldest kept; else what repaints the screen may stand for history. */
  exact?: boolean;
  output?: number;
  /** Ends all other attachments that drive. */
  displace?: boolean;
  argv?: string[];
  cwd?: string;
  env?: { [name: string]: string };
  /** Where the device key is kept: a directory (Node.js), a database's name (browsers), or a storage of your own. */
  storage?: string | DeviceStorage;
  platform?: Platform;
  /** Gives the attempt to connect up. */
  abort?: AbortSignal;
}

/** What `on` may name, and what its functions get. */
export interface SessionEvents {
  open: [
    {
      uid: string;
      name: string;
      agent: string;
      kind: string;
      mode: string;
      created: boolean;
      state: string;
      position: number;
      head: number;
    },
  ];
  /**
   * Output, its position, and whether it is history, whose questions no terminal answers any more. What a handler
   * returns is awaited; only then is the output acknowledged.
   */
  data: [data: Uint8Array, position: number, replayed: boolean];
  /** Replaces the screen: what repaints it as it is at this output position. */
  snapshot: [data: Uint8Array, position: number];
  /** Output that will never come. */
  gap: [{ start: number; end: number }];
  /** Input that may or may not have reached the agent, which is gone. */
  uncertain: [{ start: number; end: number }];
  /** `joined`, `left`, `typist` (`count` 1: we answer the program's questions), `storage`, … */
  presence: [{ kind: string; label: string; device: string; count: number | null; status: number | null }];
  /** The connection is lost or suspect since then (Date.now()), or well again: null. */
  trouble: [{ since: number; reason: string } | null];
  end: [{ status: number | null; signal: number | null; reason: string; code: number }];
  error: [SternaError];
}

type Handler<K extends keyof SessionEvents> = (...args: SessionEvents[K]) => unknown;
type AnyHandler = (...args: unknown[]) => unknown;
type Ordered =
  | { type: "data"; data: Uint8Array; end: number; replayed: boolean }
  | { type: "snapshot"; data: Uint8Array; end: number; zstd: boolean }
  | { type: "gap"; start: number; end: number }
  | { type: "end"; close: Close };
type Input = { type: "data"; data: Uint8Array; at: number } | { type: "eof" } | { type: "signal"; name: string };
interface Waiting {
  what: Input;
  done: () => void;
  fail: (error: SternaError) => void;
}

/** Where a session stands, as seen from here. */
export type SessionState = "connecting" | "open" | "trouble" | "suspended" | "ended" | "failed";

function now(): number {
  return performance.now();
}

/** A session that this program is attached to; made by `connect`. */
export class Session {
  state: SessionState = "connecting";
  private accept: Accept | null = null;
  private readonly handlers = new Map<string, Set<AnyHandler>>();
  private readonly kept = new Map<string, unknown[][]>();
  private readonly queue: Ordered[] = [];
  private pumping = false;
  private readonly inputs: Waiting[] = [];
  private readonly wires = new Map<number, Wire>();
  private timer: ReturnType<typeof setTimeout> | undefined;
  private timerDue = 0;
  private settling = false;
  private caller: Caller | null = null;
  private readonly unwatch: () => void;
  /** Settles once it is over: left, ended and read, or failed. */
  readonly closed: Promise<void>;
  private over!: () => void;
  private opened!: { resolve: (session: Session) => void; reject: (error: SternaError) => void };
  private readonly ready: Promise<Session>;
  private failure: SternaError | null = null;
  private endTold = false;

  /** Not to be called from outside: see `connect`. */
  constructor(
    private readonly machine: ClientMachine,
    private readonly target: Target,
    private readonly key: DeviceKey,
    private readonly storage: DeviceStorage,
    private readonly wish: Wish,
    platform: Platform,
  ) {
    this.ready = new Promise((resolve, reject) => (this.opened = { resolve, reject }));
    this.closed = new Promise((resolve) => (this.over = resolve));
    this.unwatch = platform.watch((reason) => this.run(() => this.machine.suspect(now(), reason)));
  }

  /** Connects; resolves once the session is there. */
  start(abort?: AbortSignal): Promise<Session> {
    abort?.addEventListener("abort", () => {
      if (this.accept === null)
        this.run(() => this.machine.fail(new SternaError(Code.TIMEOUT, "The attempt to connect was given up.")));
    });
    this.run(() => undefined);
    return this.ready;
  }

  // ---- what it is --------------------------------------------------------------------------------------------

  /** The session's real name: 32 hexadecimal digits. */
  get uid(): string {
    return this.accept === null ? "" : toHex(this.accept.uid);
  }

  /** The session's name when it was joined. */
  get name(): string {
    return this.accept?.name ?? "";
  }

  /** The agent's name. */
  get agent(): string {
    return this.accept?.agent ?? "";
  }

  /** What is behind it. */
  get kind(): "pty" | "chat" | "stream" {
    return this.accept?.kind ?? "stream";
  }

  /** Whether we type or only watch. */
  get mode(): "drive" | "watch" {
    return this.accept?.mode ?? this.wish.mode ?? "drive";
  }

  /** Whether this connection made the session. */
  get created(): boolean {
    return this.accept?.created ?? false;
  }

  /** The output position up to which everything was handled. */
  get position(): number {
    return this.machine.intake.handled;
  }

  // ---- events ------------------------------------------------------------------------------------------------

  /**
   * Calls `fn` for every event of a type; returns what ends that. What came before the first handler of its type is
   * kept for it; output waits for a `data` handler, and nothing is acknowledged before.
   */
  on<K extends keyof SessionEvents>(type: K, fn: Handler<K>): () => void {
    const handlers = this.handlers.get(type) ?? new Set();
    this.handlers.set(type, handlers.add(fn as AnyHandler));
    const kept = this.kept.get(type) ?? [];
    this.kept.delete(type);
    for (const args of kept) queueMicrotask(() => (fn as AnyHandler)(...args));
    if (type === "data") queueMicrotask(() => void this.pump());
    return () => handlers.delete(fn as AnyHandler);
  }

  private emit<K extends keyof SessionEvents>(type: K, ...args: SessionEvents[K]): unknown[] {
    const handlers = this.handlers.get(type);
    if (handlers?.size) return [...handlers].map((fn) => fn(...args));
    const kept = this.kept.get(type) ?? [];
    kept.push(args);
    this.kept.set(type, kept.slice(-EVENTS_KEPT_MAX));
    return [];
  }

  /** Emits what nobody waits for: a handler that throws is its own affair, and stops nothing here. */
  private tell<K extends keyof SessionEvents>(type: K, ...args: SessionEvents[K]): void {
    try {
      this.emit(type, ...args);
    } catch (error) {
      setTimeout(() => {
        throw error;
      });
    }
  }

  // ---- input -------------------------------------------------------------------------------------------------

  /** Types: resolves once the window (256 KiB) had room for all of it; it is sent again until it is acknowledged. */
  write(data: Uint8Array | string): Promise<void> {
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : Uint8Array.from(data);
    return this.put({ type: "data", data: bytes, at: 0 });
  }

  /** Sends a signal by its name without SIG (INT, TERM, …), in order with what was typed. */
  signal(name: string): Promise<void> {
    return this.put({ type: "signal", name });
  }

  /** Ends the input. */
  eof(): Promise<void> {
    return this.put({ type: "eof" });
  }

  /** Tells our terminal's size in cells. */
  resize(cols: number, rows: number): void {
    this.run(() => this.machine.resize(cols, rows));
  }

  private put(what: Input): Promise<void> {
    if (this.failure !== null) return Promise.reject(this.failure);
    if (this.machine.finished) return Promise.reject(endedError());
    if (this.mode === "watch")
      return Promise.reject(
        new SternaError(Code.READ_ONLY, "This attachment only watches: connect with mode drive to type."),
      );
    const taken = new Promise<void>((done, fail) => {
      this.inputs.push({ what, done, fail });
      this.run(() => this.feed());
    });
    // Who types need not wait: that a session ended meanwhile is told by `end` and `error`, too.
    taken.catch(() => undefined);
    return taken;
  }

  /** Gives the machine as much of what waits as the window takes. */
  private feed(): void {
    while (this.inputs.length) {
      const { what, done } = this.inputs[0];
      if (what.type === "data") {
        what.at += this.machine.write(what.data.subarray(what.at), now());
        if (what.at < what.data.length) return;
      } else if (!(what.type === "eof" ? this.machine.eof(now()) : this.machine.signal(what.name, now()))) return;
      this.inputs.shift();
      done();
    }
  }

  // ---- the end -----------------------------------------------------------------------------------------------

  /** Leaves politely: the session goes on without us. */
  suspend(): Promise<void> {
    this.run(() => this.machine.suspend(now()));
    return this.closed;
  }

  /** Ends the session for good; resolves once it is over (its last output waits for the `data` handler). */
  close(): Promise<void> {
    this.run(() => this.machine.close());
    return this.closed;
  }

  /** Asks the node something (`list`, `info`, `share`, `devices`, `rename`, `close`, …), on its own connection. */
  call(method: string, params: { [key: string]: unknown } = {}): Promise<unknown> {
    this.caller ??= new Caller(this.target, this.key, this.wish);
    return this.caller.call(method, params);
  }

  // ---- the machine -------------------------------------------------------------------------------------------

  /** Does something with the machine, and all that follows from it. */
  private run(what: () => void): void {
    try {
      what();
    } finally {
      this.settle();
    }
  }

  private settle(): void {
    if (this.settling) return;
    this.settling = true;
    try {
      for (;;) {
        const action = this.machine.nextAction();
        if (action?.type === "dial") this.dial(action.connection);
        else if (action?.type === "drop") this.drop(action.connection, action.last);
        else if (action?.type === "prove")
          void this.prove(action.connection, action.ask, action.resume, action.atLeast);
        if (action !== undefined) continue;
        for (const [number, frames] of this.machine.dataToSend()) this.wires.get(number)?.send(frames);
        const event = this.machine.nextEvent();
        if (event === undefined) break;
        this.happened(event);
      }
    } finally {
      this.settling = false;
    }
    this.arm();
  }

  private arm(): void {
    const due = this.machine.nextTimeout();
    if (due === null) {
      clearTimeout(this.timer);
      this.timer = undefined;
      return;
    }
    // One that is early stays: it will look again.
    if (this.timer !== undefined && this.timerDue <= due) return;
    clearTimeout(this.timer);
    this.timerDue = due;
    this.timer = setTimeout(() => this.timeout(), Math.max(due - now(), 0));
  }

  private timeout(): void {
    this.timer = undefined;
    const due = this.machine.nextTimeout();
    const time = now();
    if (due !== null && due <= time + 1) this.run(() => this.machine.handleTimeout(Math.max(time, due)));
    else this.arm();
  }

  private dial(number: number): void {
    const hears: Hears = {
      reached: () => this.run(() => this.machine.reached(number, now())),
      open: () => this.run(() => this.machine.established(number, now())),
      data: (data) => this.run(() => this.machine.receive(number, data, now())),
      failed: (error, options) => {
        this.wires.delete(number);
        this.run(() => this.machine.dialFailed(number, now(), error, options));
      },
      ended: (reason) => {
        this.wires.delete(number);
        this.run(() => this.machine.lost(number, now(), reason));
      },
    };
    this.wires.set(number, this.target.dial(hears));
  }

  private drop(number: number, last: Uint8Array[]): void {
    const wire = this.wires.get(number);
    this.wires.delete(number);
    if (last.length) wire?.send(last);
    wire?.close();
  }

  private async prove(number: number, ask: number, resume: boolean, atLeast: bigint | null): Promise<void> {
    try {
      if (atLeast !== null) await this.storage.raiseCounter(atLeast);
      const counter = resume ? await this.storage.nextCounter(wallNs()) : 0n;
      const proof = this.machine.proof(number, ask, counter);
      if (proof === null) return;
      const signature = await this.key.sign(toSign(proof.context, this.target.node, proof.body));
      this.run(() => this.machine.proved(number, ask, signature));
    } catch (error) {
      this.run(() => this.machine.fail(asSternaError(error)));
    }
  }

  private happened(event: MachineEvent): void {
    switch (event.type) {
      case "opened":
        return this.open(event.accept);
      case "output":
        return this.enqueue({
          type: "data",
          data: event.data,
          end: event.end,
          replayed: event.end <= this.machine.replayUntil,
        });
      case "screen":
        return this.enqueue({ type: "snapshot", data: event.data, end: event.position, zstd: event.zstd });
      case "gap":
        return this.enqueue({ type: "gap", start: event.start, end: event.end });
      case "ended":
        this.endTold = true;
        return this.enqueue({ type: "end", close: event.close });
      case "roomy":
        return this.feed();
      case "uncertain":
        return void this.tell("uncertain", { start: event.start, end: event.end });
      case "notice": {
        const { kind, label, device, count, status } = event.event;
        return void this.tell("presence", { kind, label: clean(label, 80), device, count, status });
      }
      case "trouble":
        if (this.accept === null) return; // that the first connection worked is no news
        this.state = event.troubled ? "trouble" : "open";
        return void this.tell("trouble", event.troubled ? { since: Date.now(), reason: event.reason } : null);
      case "suspended":
        return this.finish("suspended", endedError());
      case "failed": {
        if (this.endTold) return; // the node forgot the session while its end was being read
        this.failure = event.error;
        this.finish("failed", event.error);
        if (this.accept === null) this.opened.reject(event.error);
        else this.tell("error", event.error);
      }
    }
  }

  private open(accept: Accept): void {
    this.accept = accept;
    this.state = "open";
    const { name, agent, kind, mode, created, state, output, head } = accept;
    this.tell("open", { uid: this.uid, name, agent, kind, mode, created, state, position: output, head });
    this.opened.resolve(this);
  }

  private finish(state: SessionState, error: SternaError): void {
    this.state = state;
    clearTimeout(this.timer);
    this.timer = undefined;
    this.unwatch();
    this.caller?.close();
    for (const { fail } of this.inputs.splice(0)) fail(error);
    this.over();
  }

  // ---- output, in order --------------------------------------------------------------------------------------

  private enqueue(item: Ordered): void {
    this.queue.push(item);
    if (!this.pumping && this.handlers.get("data")?.size) queueMicrotask(() => void this.pump());
  }

  private async pump(): Promise<void> {
    if (this.pumping) return;
    this.pumping = true;
    try {
      while (this.queue.length && this.handlers.get("data")?.size) {
        const item = this.queue[0];
        const promises = this.give(item).filter((value) => value instanceof Promise);
        if (promises.length) await Promise.all(promises);
        this.queue.shift();
        if (item.type === "data") this.run(() => this.machine.handled(item.end, now()));
        else if (item.type === "end") {
          this.queue.length = 0; // a CLOSE may come twice
          this.confirm();
        }
      }
    } catch (error) {
      // A handler that throws has not handled its output: to go on would acknowledge what is lost.
      this.endTold = false;
      this.run(() => this.machine.fail(asSternaError(error)));
    } finally {
      this.pumping = false;
    }
  }

  private give(item: Ordered): unknown[] {
    switch (item.type) {
      case "data":
        return this.emit("data", item.data, item.end - item.data.length, item.replayed);
      case "snapshot":
        return this.emit("snapshot", item.zstd ? decompress(item.data) : item.data, item.end);
      case "gap":
        return this.emit("gap", { start: item.start, end: item.end });
      case "end": {
        const { status, signal, reason, code } = item.close;
        return this.emit("end", { status, signal, reason, code });
      }
    }
  }

  private confirm(): void {
    if (this.state === "suspended" || this.state === "failed") return;
    this.run(() => this.machine.confirmEnd());
    this.finish("ended", endedError());
  }
}

function endedError(): SternaError {
  return new RefusedError(Code.ENDED, "The session takes no more input: it ended, or was left.");
}

function asSternaError(error: unknown): SternaError {
  if (error instanceof SternaError) return error;
  const wrapped = new SternaError(
    Code.INTERNAL,
    `Something in this program failed: ${(error as Error)?.message ?? error}`,
  );
  wrapped.cause = error;
  return wrapped;
}

// ---- connect ---------------------------------------------------------------------------------------------------

/** Connects to a session; resolves once it is there. Throws (rejects with) a SternaError that says what to do. */
export async function connectWith(platform: Platform, options: ConnectOptions): Promise<Session> {
  const { where, wish, storage, key, target } = await prepare(platform, options);
  const device = new Uint8Array(await digest(key.public));
  const identity = { public: key.public, device, node: target.node, random };
  const machine = new ClientMachine(wish, identity, now(), target.pacing);
  return new Session(machine, target, key, storage, wish, where).start(options.abort);
}

/** Returns what asks a node questions without a session; it connects with the first one. Rejects as `connectWith`. */
export async function callerWith(platform: Platform, options: ConnectOptions): Promise<Caller> {
  const { wish, key, target } = await prepare(platform, options);
  return new Caller(target, key, wish);
}

async function prepare(platform: Platform, options: ConnectOptions): Promise<Prepared> {
  const where = options.platform ?? platform;
  const parsed = options.url === undefined ? null : parseLink(options.url);
  const place = placeOf(where, parsed, options);
  const wish = wishOf(options, parsed, where);
  const storage = typeof options.storage === "object" ? options.storage : await where.storage(options.storage);
  const key = await storage.loadKey();
  const target = await where.find(place, parsed?.node ?? nodeOf(options.node), storage);
  return { where, wish, storage, key, target };
}

interface Prepared {
  where: Platform;
  wish: Wish;
  storage: DeviceStorage;
  key: DeviceKey;
  target: Target;
}

async function digest(data: Bytes): Promise<ArrayBuffer> {
  return globalThis.crypto.subtle.digest("SHA-256", data);
}

function placeOf(platform: Platform, parsed: ParsedLink | null, options: ConnectOptions): Place {
  if (parsed !== null) {
    const { host, scheme } = parsed;
    const direct = scheme === "wss" || scheme === "ws";
    if (!direct && platform.transport === "tls") return { transport: "tls", host, port: parsed.sessionPort, url: "" };
    const port = scheme === "sterna" ? WEB_PORT : parsed.port;
    const path = direct ? parsed.path : WEBSOCKET_PATH;
    return { transport: "websocket", host, port, url: `${direct ? scheme : "wss"}://${joined(host, port)}${path}` };
  }
  const { host } = options;
  if (host === undefined) throw new UsageError("Say what to connect to: a url, or host and port.");
  if (platform.transport === "tls") return { transport: "tls", host, port: options.port ?? SESSION_PORT, url: "" };
  const port = options.port ?? WEB_PORT;
  return { transport: "websocket", host, port, url: `wss://${joined(host, port)}${WEBSOCKET_PATH}` };
}

function nodeOf(node: Uint8Array | string | undefined): Bytes | null {
  if (node === undefined) return null;
  if (typeof node === "string") return parseNodeId(node);
  if (node.length !== 32) throw new UsageError("A node id has 32 bytes.");
  return Uint8Array.from(node);
}

function wishOf(options: ConnectOptions, parsed: ParsedLink | null, platform: Platform): Wish {
  const credential = options.ticket ?? options.token ?? parsed?.ticket ?? "";
  if (!credential) throw new UsageError("Something must let us in: a share link with its ticket, or a token.");
  const called =
    typeof options.session === "string" && !/^[0-9a-fA-F]{32}$/.test(options.session) ? options.session : undefined;
  const uid = parsed?.session ?? (called === undefined ? uidOf(options.session) : null);
  const agent = options.agent ?? parsed?.agent ?? undefined;
  const make = options.create ?? agent !== undefined;
  const joining = uid !== null || called !== undefined || (parsed?.ticket ?? options.ticket) !== undefined;
  const named = options.name !== undefined;
  const want = joining || (named && !make) ? "join" : named ? "named" : options.create ? "new" : "latest";
  return {
    credential,
    want,
    agent,
    name: called ?? options.name,
    uid: uid ?? undefined,
    label: clean(options.label ?? platform.label(), 80),
    mode: parsed?.mode === "watch" ? "watch" : (options.mode ?? "drive"),
    exact: options.exact,
    displace: options.displace,
    output: options.output,
    cols: options.cols ?? (options.term ? 80 : 0),
    rows: options.rows ?? (options.term ? 24 : 0),
    term: options.term,
    argv: options.argv,
    cwd: options.cwd,
    env: options.env,
  };
}

function uidOf(session: Uint8Array | string | undefined): Bytes | null {
  if (session === undefined) return null;
  const bytes = typeof session === "string" ? fromHex(session) : Uint8Array.from(session);
  if (bytes?.length !== 16) throw new UsageError("A session's uid has 16 bytes, or 32 hexadecimal digits.");
  return bytes;
}

/**
 * The client's side of one attachment: connect, resume, race, and notice trouble (docs/protocol.md, section 4).
 *
 * Sans-IO: a driver dials and signs when `nextAction` says so, passes bytes and time (milliseconds, any origin) in, and
 * deals with events. Several connections may be open at once; at most one is active.
 */

import { concat, u64 } from "./bytes.js";
import { Code, isFinal, ProtocolError, RefusedError, SternaError } from "./errors.js";
import { type Frame, Type } from "./frame.js";
import {
  ANSWER_MS,
  HANDSHAKE_MS,
  RACE_EVERY_MS,
  RACE_OPEN_MAX,
  SNAPSHOT_MAX_BYTES,
  SNAPSHOT_PART_BYTES,
} from "./limits.js";
import { Link } from "./link.js";
import {
  Accept,
  Close,
  CONTEXT_CONNECT,
  CONTEXT_RESUME,
  ErrorMessage,
  Event as EventMessage,
  type Lost,
  pack,
  parse,
  parseShown,
  Resumed,
  Snapshot,
} from "./messages.js";
import { Race, Vitals } from "./race.js";
import { Intake, SendStream } from "./stream.js";

const FATAL: ReadonlySet<number> = new Set([
  Code.NOT_FOUND,
  Code.NO_AGENT,
  Code.ENDED,
  Code.VERSION,
  Code.TOO_LARGE,
  Code.BAD_PAYLOAD,
  Code.BAD_REQUEST,
  Code.UNSUPPORTED,
  Code.EXISTS,
  Code.READ_ONLY,
  Code.DISPLACED,
  Code.LIMIT,
  Code.MOVED,
]);
const FATAL_AT_FIRST: ReadonlySet<number> = new Set([Code.STORAGE, Code.RATE_LIMITED]);
const PARTS_MAX = Math.floor(SNAPSHOT_MAX_BYTES / SNAPSHOT_PART_BYTES) + 1;

/** What the driver shall do with connections. */
export type Action =
  /** Open a connection and report it under this number. */
  | { type: "dial"; connection: number }
  /** Close this connection once `last` was sent. */
  | { type: "drop"; connection: number; last: Uint8Array[] }
  /** Raise the stored counter to `atLeast`, take the next one for a RESUME, ask for `proof`, sign, say `proved`. */
  | { type: "prove"; connection: number; ask: number; resume: boolean; atLeast: bigint | null };

/** What happened. */
export type MachineEvent =
  | { type: "opened"; accept: Accept }
  /** Output bytes; `end` is to be reported by `handled` once they are dealt with. */
  | { type: "output"; data: Uint8Array; end: number }
  /** What repaints the screen as it is at output position `position`; compressed if `zstd`. */
  | { type: "screen"; data: Uint8Array; position: number; zstd: boolean }
  /** Output that will never come. */
  | { type: "gap"; start: number; end: number }
  /** Input that may or may not have reached the agent, which is gone; it is not repeated. */
  | { type: "uncertain"; start: number; end: number }
  /** The connection is gone or suspect, or well again. */
  | { type: "trouble"; troubled: boolean; reason: string }
  | { type: "notice"; event: EventMessage }
  /** Input finds room in the window again. */
  | { type: "roomy" }
  /** The session ended; after all output is handled, `confirmEnd` is to be called. */
  | { type: "ended"; close: Close }
  | { type: "suspended" }
  | { type: "failed"; error: SternaError };

/** What CONNECT asks for beside what the machine knows itself. */
export interface Wish {
  credential: string;
  want: "latest" | "named" | "new" | "join";
  agent?: string;
  name?: string;
  uid?: Uint8Array;
  label?: string;
  mode?: "drive" | "watch";
  exact?: boolean;
  displace?: boolean;
  output?: number;
  cols?: number;
  rows?: number;
  term?: string;
  argv?: string[];
  cwd?: string;
  env?: { [name: string]: string };
}

/** Who we are and where: the public key in wire form and its id (SHA-256 of it), the node's id, and randomness. */
export interface Identity {
  public: Uint8Array;
  device: Uint8Array;
  node: Uint8Array;
  random(count: number): Uint8Array;
}

/**
 * How eagerly connections race each other: one every `everyMs`, at most `openMax` at once; `slowing`: each pause is
 * twice as long as the one before, up to 4 s, where nothing tells that a connection has got half-way.
 */
export interface Pacing {
  everyMs: number;
  openMax: number;
  slowing?: boolean;
}

class Connection {
  readonly link = new Link();
  handle = 0;
  /** When something was asked on it, -1 before. */
  asked = -1;
  ask = 0;
  established = false;
  size: readonly [number, number] = [0, 0];
  proof: { type: number; body: Uint8Array } | null = null;

  constructor(readonly number: number) {}
}

/** One attachment to one session, through any number of connections. */
export class ClientMachine {
  readonly attachment: Uint8Array;
  uid: Uint8Array | null = null;
  log = 0n;
  epoch = 1n;
  readonly input = new SendStream();
  readonly intake = new Intake();
  /** Output before it is history: it was sent before the connection was made, and nobody waits for answers to it. */
  replayUntil = 0;
  private cols: number;
  private rows: number;
  private readonly request: Uint8Array;
  private readonly connections = new Map<number, Connection>();
  private numbers = 0;
  private asks = 0;
  private active: Connection | null = null;
  private raceId: Uint8Array | null = null;
  private readonly actions: Action[] = [];
  private readonly events: MachineEvent[] = [];
  private parts: Uint8Array[] = [];
  private partsBytes = 0;
  private missed: Lost | null = null; // what the picture that comes stands for
  private nextLog = 0n; // the node's; ours is another one until we know where we are in it
  private suspected = 0;
  private leaving = false;
  private closing = false;
  /** A RESUME went out that may still displace the active connection. */
  private resuming = false;
  private ended = false;
  private full = false;
  private readonly vitals: Vitals;
  private readonly race: Race;

  constructor(
    private readonly wish: Wish,
    private readonly who: Identity,
    private readonly started: number,
    private readonly pacing: Pacing = { everyMs: RACE_EVERY_MS, openMax: RACE_OPEN_MAX },
  ) {
    this.attachment = who.random(16);
    this.request = who.random(16);
    this.cols = wish.cols ?? 80;
    this.rows = wish.rows ?? 24;
    this.vitals = new Vitals(started);
    const share = (): number => new DataView(Uint8Array.from(who.random(4)).buffer).getUint32(0) / 2 ** 32;
    this.race = new Race(share, pacing.everyMs, pacing.slowing);
    this.race.begin(started);
    this.dialDue(started);
  }

  // ---- for the driver ----------------------------------------------------------------------------------------

  /** Returns what to do with connections next. */
  nextAction(): Action | undefined {
    return this.actions.shift();
  }

  /** Returns what happened next. */
  nextEvent(): MachineEvent | undefined {
    return this.events.shift();
  }

  /** Returns [connection, frames] for all connections that have something to send. */
  dataToSend(): [number, Uint8Array[]][] {
    const out: [number, Uint8Array[]][] = [];
    for (const one of this.connections.values()) {
      if (one.established && one.link.pending) out.push([one.number, one.link.dataToSend()]);
    }
    return out;
  }

  /** Whether nothing more will happen. */
  get finished(): boolean {
    return this.ended;
  }

  /** Whether a connection carries the session now. */
  get connected(): boolean {
    return this.active !== null;
  }

  /** A connection reached the node's machine; who is there, TLS has still to prove. */
  reached(number: number, now: number): void {
    if (this.connections.has(number)) this.race.connected(now);
  }

  /** A connection is open and, with TLS, the other side is proved to be the node. */
  established(number: number, now: number): void {
    const connection = this.connections.get(number);
    if (connection === undefined || this.ended) return;
    connection.established = true;
    this.race.established(now);
    if (!this.asking()) this.ask(connection, now);
  }

  /**
   * A connection could not be opened; `refused` says that nobody listens there (or the network said no). That ends a
   * first attempt, as `error` says; `fatal` ends any.
   */
  dialFailed(number: number, now: number, error: SternaError, options: { refused: boolean; fatal?: boolean }): void {
    if (!this.connections.delete(number) || this.ended) return;
    this.race.failed(now, options.refused);
    if (options.fatal || (this.uid === null && (options.refused || now - this.started > HANDSHAKE_MS)))
      this.fail(error);
  }

  /** A connection is gone. */
  lost(number: number, now: number, reason = ""): void {
    const connection = this.connections.get(number);
    if (connection === undefined || this.ended) return;
    this.connections.delete(number);
    if (connection === this.active) {
      this.active = null;
      if (this.leaving) this.finish({ type: "suspended" });
      else this.suspectNow(now, reason || "connection lost");
    } else if (connection.asked >= 0) {
      this.raceId = null;
      if (this.uid === null && now - this.started > HANDSHAKE_MS) {
        this.fail(new RefusedError(Code.TIMEOUT, "The node ends every connection."));
        return;
      }
      this.race.failed(now, true);
      this.askNext(now);
      this.lookOn(now);
    }
  }

  /** Takes bytes of a connection. */
  receive(number: number, data: Uint8Array, now: number): void {
    const connection = this.connections.get(number);
    if (connection === undefined || this.ended) return;
    if (connection === this.active) this.vitals.received(now);
    try {
      for (const frame of connection.link.receive(data)) this.frame(connection, frame, now);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.broken(connection, error, now);
      return;
    }
    connection.link.check();
    if (connection.link.closing) {
      this.broken(connection, new ProtocolError(Code.PROTOCOL, "the node sent broken bytes"), now);
    }
  }

  /** The driver saw trouble: the network changed, the machine slept. */
  suspect(now: number, reason: string): void {
    if (!this.ended && this.uid !== null) this.suspectNow(now, reason);
  }

  /** Returns what is to be signed for an action `prove`, null if it is no longer wanted. */
  proof(number: number, ask: number, counter: bigint): { context: string; body: Uint8Array } | null {
    const connection = this.connections.get(number);
    if (connection === undefined || connection.ask !== ask || this.ended) return null;
    connection.size = [this.cols, this.rows];
    const resume = this.uid !== null;
    const context = resume ? CONTEXT_RESUME : CONTEXT_CONNECT;
    const body = pack(resume ? this.resumeBody(counter) : this.connectBody());
    connection.proof = { type: resume ? Type.RESUME : Type.CONNECT, body };
    return { context, body };
  }

  /** Passes in the signature over what `proof` returned. */
  proved(number: number, ask: number, sig: Uint8Array): void {
    const connection = this.connections.get(number);
    if (connection === undefined || connection.ask !== ask || connection.proof === null || this.ended) return;
    connection.link.sendMessage(connection.proof.type, connection.handle, { body: connection.proof.body, sig });
    connection.proof = null;
  }

  /** Ends everything with an error of the driver's own. */
  fail(error: SternaError): void {
    if (!this.ended) this.finish({ type: "failed", error });
  }

  // ---- for the user ------------------------------------------------------------------------------------------

  /** Takes input, as much as the window has room for; returns how many bytes. */
  write(data: Uint8Array, now: number): number {
    const taken = this.input.write(data);
    this.full = taken < data.length;
    this.sendInput(now);
    return taken;
  }

  /** Ends the input; false when the window has no room for it yet. */
  eof(now: number): boolean {
    return this.mark(Type.EOF, new Uint8Array(0), now);
  }

  /** Sends a signal by name (INT, TERM, …), in order with the input; false when there is no room yet. */
  signal(name: string, now: number): boolean {
    return this.mark(Type.SIGNAL, pack({ name }), now);
  }

  private mark(type: number, payload: Uint8Array, now: number): boolean {
    const done = this.input.mark(type, payload);
    this.full = !done;
    this.sendInput(now);
    return done;
  }

  /** Tells the terminal's size in cells. */
  resize(cols: number, rows: number): void {
    this.cols = cols;
    this.rows = rows;
    this.active?.link.sendMessage(Type.RESIZE, this.active.handle, { cols, rows });
  }

  /** Notes that all output before `position` is dealt with. */
  handled(position: number, now: number): void {
    this.intake.handle(position, now);
    this.acknowledge(now, false);
  }

  /** Leaves politely; `suspended` follows, at once when there is no connection. */
  suspend(now: number): void {
    if (this.ended || this.leaving) return;
    this.leaving = true;
    const connection = this.active;
    if (connection === null) {
      this.finish({ type: "suspended" });
      return;
    }
    for (const other of [...this.connections.values()]) if (other !== connection) this.drop(other);
    this.race.end();
    this.acknowledge(now, true);
    connection.link.sendMessage(Type.SUSPEND, connection.handle, { position: this.intake.handled });
    connection.asked = now;
  }

  /** Asks to end the session for good; without a connection, as soon as there is one. */
  close(): void {
    this.closing = true;
    this.active?.link.sendMessage(Type.CLOSE, this.active.handle, {});
  }

  /** Tells the node that the final output and status were read; it may forget the session. */
  confirmEnd(): void {
    const connection = this.active;
    if (connection !== null && !this.ended) {
      const { handled } = this.intake;
      connection.link.send(Type.ACK, connection.handle, handled, u64(handled));
      connection.link.sendMessage(Type.CLOSE, connection.handle, {});
    }
    this.ended = true;
    this.active = null;
    for (const one of [...this.connections.values()]) this.drop(one);
  }

  // ---- time --------------------------------------------------------------------------------------------------

  /** Returns when `handleTimeout` is to be called, or null. */
  nextTimeout(): number | null {
    if (this.ended) return null;
    const times = [this.race.due(), this.askedDue()];
    if (this.active !== null) times.push(this.vitals.due(this.input.end > this.input.base), this.intake.timeout());
    const due = times.filter((time) => time !== null);
    return due.length ? Math.min(...due) : null;
  }

  private askedDue(): number | null {
    const waiting = [...this.connections.values()].filter((c) => c.asked >= 0 && (c !== this.active || this.leaving));
    return waiting.length ? Math.min(...waiting.map((c) => c.asked)) + ANSWER_MS : null;
  }

  /** Does what is due: acknowledge, ping, suspect, dial, give up on an unanswered question. */
  handleTimeout(now: number): void {
    if (this.ended) return;
    this.acknowledge(now, false);
    if (this.active !== null) {
      const what = this.vitals.check(now, this.input.end > this.input.base);
      if (what === "ping") this.ping(this.active, now);
      else if (what) this.suspectNow(now, what);
    }
    for (const connection of [...this.connections.values()]) {
      if (connection.asked >= 0 && now - connection.asked >= ANSWER_MS) this.unanswered(connection, now);
    }
    if (this.ended) return;
    this.dialDue(now);
    if (this.uid === null && now - this.started > HANDSHAKE_MS) {
      this.fail(new RefusedError(Code.TIMEOUT, "The node does not answer."));
    }
  }

  private unanswered(connection: Connection, now: number): void {
    if (connection === this.active) {
      if (this.leaving) this.finish({ type: "suspended" });
      return;
    }
    this.drop(connection);
    this.raceId = null;
    this.askNext(now);
    this.lookOn(now);
  }

  /** Begins to race if an answer did not come outside of a race (a RESUME that followed `resync`). */
  private lookOn(now: number): void {
    if (this.uid !== null && this.active === null && !this.race.running && !this.asking()) {
      this.suspectNow(now, "no answer");
    }
  }

  /** Begins the connections that the race wants now; the oldest unestablished one makes room. */
  private dialDue(now: number): void {
    while (this.race.take(now)) {
      const open = [...this.connections.values()].filter((c) => c !== this.active);
      if (open.length >= this.pacing.openMax) {
        const waiting = open.find((c) => !c.established);
        if (waiting === undefined) return;
        this.drop(waiting);
      }
      this.numbers += 1;
      this.connections.set(this.numbers, new Connection(this.numbers));
      this.actions.push({ type: "dial", connection: this.numbers });
    }
  }

  // ---- connecting --------------------------------------------------------------------------------------------

  /** Asks on another established connection, if there is one that nothing was asked on. */
  private askNext(now: number): void {
    for (const connection of this.connections.values()) {
      if (connection.established && connection.asked < 0 && connection !== this.active) {
        this.ask(connection, now);
        return;
      }
    }
  }

  /** Has CONNECT signed, or RESUME once there is a session; it is sent when the signature comes. */
  private ask(connection: Connection, now: number, atLeast: bigint | null = null): void {
    connection.handle += 1;
    connection.asked = now;
    connection.ask = ++this.asks;
    connection.proof = null;
    const resume = this.uid !== null;
    if (resume) {
      this.resuming = true;
      this.raceId ??= this.who.random(16);
    }
    this.actions.push({ type: "prove", connection: connection.number, ask: connection.ask, resume, atLeast });
  }

  private connectBody(): object {
    const { wish, who } = this;
    return {
      context: CONTEXT_CONNECT,
      node: who.node,
      request: this.request,
      key: who.public,
      attachment: this.attachment,
      ...wish,
      cols: this.cols,
      rows: this.rows,
    };
  }

  private resumeBody(counter: bigint): object {
    const { intake, wish, who } = this;
    this.raceId ??= who.random(16);
    return {
      context: CONTEXT_RESUME,
      node: who.node,
      uid: this.uid,
      device: who.device,
      attachment: this.attachment,
      race: this.raceId,
      counter,
      epoch: this.epoch,
      log: this.log,
      output: intake.next,
      sent: this.input.sent,
      handled: intake.handled < intake.next ? intake.handled : undefined,
      cols: wish.term && !wish.exact ? this.cols : 0,
      rows: this.rows,
    };
  }

  /** Makes a connection the active one; all others end. */
  private takeOver(connection: Connection, now: number): void {
    connection.asked = -1;
    this.active = connection;
    this.resuming = false;
    this.raceId = null;
    for (const other of [...this.connections.values()]) if (other !== connection) this.drop(other);
    const [cols, rows] = connection.size;
    // Changed since it was asked: what was said of that on the connection before may never arrive.
    if (cols !== this.cols || rows !== this.rows) this.resize(this.cols, this.rows);
    this.vitals.renewed(now);
    if (this.race.running) this.calm();
    if (this.closing) this.close();
  }

  private calm(): void {
    this.race.end();
    this.events.push({ type: "trouble", troubled: false, reason: "" });
  }

  /** Begins to race new connections; the old one, if there is one, stays until another is RESUMED. */
  private suspectNow(now: number, reason: string): void {
    if (this.leaving) {
      if (this.active === null) this.finish({ type: "suspended" });
      return;
    }
    if (this.race.running) {
      this.race.hurry(now);
    } else {
      this.raceId = null;
      this.suspected = now;
      this.race.begin(now);
      this.events.push({ type: "trouble", troubled: true, reason });
      if (this.active !== null) this.ping(this.active, now);
    }
    this.dialDue(now);
  }

  private drop(connection: Connection): void {
    if (!this.connections.delete(connection.number)) return;
    const last = connection.established ? connection.link.dataToSend() : [];
    this.actions.push({ type: "drop", connection: connection.number, last });
  }

  /** Ends a connection whose peer broke the protocol; the session resumes on another. */
  private broken(connection: Connection, error: ProtocolError, now: number): void {
    connection.link.fail(error.code, error.message);
    this.drop(connection);
    if (connection === this.active) {
      this.active = null;
      this.suspectNow(now, error.message);
    } else if (this.uid === null) this.fail(error);
  }

  private asking(): boolean {
    for (const c of this.connections.values()) if (c.asked >= 0 && c !== this.active) return true;
    return false;
  }

  // ---- frames ------------------------------------------------------------------------------------------------

  private frame(connection: Connection, frame: Frame, now: number): void {
    const { type, handle, payload } = frame;
    if (this.ended) return;
    if (connection === this.active && handle === connection.handle) this.sessionFrame(connection, frame, now);
    else if (handle === connection.handle && handle) {
      if (type === Type.ACCEPT) this.accepted(connection, parseShown(Accept, payload), now);
      else if (type === Type.RESUMED) this.resumed(connection, parse(Resumed, payload), now);
      else if (type === Type.CLOSE) {
        this.takeOver(connection, now);
        this.events.push({ type: "ended", close: parseShown(Close, payload) });
      } else if (type === Type.ERROR) this.refused(connection, parseShown(ErrorMessage, payload), now);
    } else if (handle === 0) this.connectionFrame(connection, type, payload, now);
  }

  private connectionFrame(connection: Connection, type: number, payload: Uint8Array, now: number): void {
    if (type === Type.PING) connection.link.send(Type.PONG, 0, 0, payload);
    else if (type === Type.PONG) {
      if (payload.length !== 8) return;
      const stamp = new DataView(payload.buffer, payload.byteOffset).getFloat64(0);
      this.vitals.answered(stamp, now);
      if (connection === this.active && this.race.running && !this.asking()) this.well(stamp);
    } else if (type === Type.ERROR) {
      const error = parseShown(ErrorMessage, payload);
      this.drop(connection);
      if (connection === this.active && !isFinal(error.code)) {
        this.active = null;
        this.suspectNow(now, error.message);
      } else this.refused(connection, error, now);
      if (error.retry_after !== null) this.race.wait(now, error.retry_after);
    }
  }

  private ping(connection: Connection, now: number): void {
    const stamp = new Uint8Array(8);
    new DataView(stamp.buffer).setFloat64(0, now);
    connection.link.send(Type.PING, 0, 0, stamp);
    this.vitals.asked(now);
  }

  /** The suspect connection answered a PING sent since, before another one was asked for: it stays. */
  private well(stamp: number): void {
    if (!(stamp >= this.suspected)) return;
    for (const other of [...this.connections.values()]) if (other !== this.active) this.drop(other);
    this.calm();
  }

  private sessionFrame(connection: Connection, frame: Frame, now: number): void {
    const { type, payload } = frame;
    if (type === Type.DATA) {
      this.vitals.traffic(now);
      const data = this.intake.receive(frame.seq, payload);
      if (data !== null) this.events.push({ type: "output", data, end: this.intake.next });
    } else if (type === Type.ACK) this.acknowledged(payload);
    else if (type === Type.SNAPSHOT) this.snapshot(parse(Snapshot, payload));
    else if (type === Type.CLOSE) this.events.push({ type: "ended", close: parseShown(Close, payload) });
    else if (type === Type.SUSPEND) {
      if (this.leaving) this.finish({ type: "suspended" });
    } else if (type === Type.EVENT) {
      const event = parseShown(EventMessage, payload);
      if (event.kind === "uncertain" && event.start !== null && event.end !== null) {
        this.events.push({ type: "uncertain", start: event.start, end: event.end });
      } else this.events.push({ type: "notice", event });
    } else if (type === Type.ERROR) {
      this.active = null;
      connection.asked = -1;
      this.refused(connection, parseShown(ErrorMessage, payload), now);
    }
  }

  private acknowledged(payload: Uint8Array): void {
    if (payload.length !== 8) return;
    const position = new DataView(payload.buffer, payload.byteOffset).getBigUint64(0);
    // Beyond what numbers hold is beyond what was sent, too: SendStream refuses it.
    if (this.input.acknowledge(Number(position))) this.roomy();
  }

  private roomy(): void {
    if (!this.full || !this.input.room) return;
    this.full = false;
    this.events.push({ type: "roomy" });
  }

  private accepted(connection: Connection, accept: Accept, now: number): void {
    if (accept.uid.length !== 16) throw new ProtocolError(Code.BAD_PAYLOAD, "a session's uid has 16 bytes");
    this.uid = accept.uid;
    this.log = this.nextLog = accept.log;
    this.epoch = accept.epoch;
    this.replayUntil = accept.head;
    this.intake.skip(accept.output);
    this.takeOver(connection, now);
    this.events.push({ type: "opened", accept });
    this.sendInput(now);
  }

  private resumed(connection: Connection, resumed: Resumed, now: number): void {
    this.takeOver(connection, now);
    // The connection that was left may have brought output since RESUME was sent: that is neither lost nor new.
    const { next } = this.intake;
    const ahead = resumed.log === this.log && resumed.output <= next && next <= resumed.head;
    this.epoch = resumed.epoch;
    this.nextLog = resumed.log;
    this.replayUntil = resumed.head;
    // Until a picture that is promised is there, what it stands for may have to be asked for, and named, again.
    if (!ahead && !resumed.snapshot) this.goOn(resumed.lost, resumed.output);
    this.intake.told(this.intake.handled);
    const { input } = this;
    if (resumed.input === null) {
      if (input.end > input.base) this.events.push({ type: "uncertain", start: input.base, end: input.end });
      return;
    }
    if (resumed.forgotten && resumed.input > input.base) {
      this.events.push({ type: "uncertain", start: input.base, end: resumed.input });
    }
    input.rewind(resumed.input);
    this.roomy();
    this.sendInput(now);
  }

  /** Moves to `position` of the node's log; what an earlier connection brought meanwhile is not lost. */
  private goOn(lost: Lost | null, position: number): void {
    if (lost !== null) {
      const got = this.log === this.nextLog ? this.intake.next : 0;
      this.events.push({ type: "gap", start: Math.min(Math.max(lost.start, got), lost.end), end: lost.end });
    }
    this.log = this.nextLog;
    this.intake.skip(position);
  }

  /** Collects what repaints the screen; it moves our place in the output. */
  private snapshot(part: Snapshot): void {
    if (part.part === 0) {
      this.parts = [];
      this.partsBytes = 0;
      this.missed = part.lost;
    }
    this.parts.push(part.data);
    this.partsBytes += part.data.length;
    if (this.partsBytes > SNAPSHOT_MAX_BYTES || this.parts.length > PARTS_MAX) {
      throw new ProtocolError(Code.TOO_LARGE, "a snapshot is too large, or has too many parts");
    }
    if (!part.last) return;
    const data = concat(this.parts);
    this.parts = [];
    this.goOn(this.missed, part.position);
    if (data.length) this.events.push({ type: "screen", data, position: part.position, zstd: part.zstd });
  }

  /** Deals with an ERROR: again with better numbers, again later, or never. */
  private refused(connection: Connection, error: ErrorMessage, now: number): void {
    const { code } = error;
    if (code === Code.STALE && error.value !== null) {
      this.raceId = null;
      this.ask(connection, now, error.value);
    } else if (code === Code.RESYNC && this.uid !== null && connection.asked < 0 && this.asking()) {
      this.drop(connection); // what was asked on another connection is a RESUME already: two displace each other
    } else if (code === Code.RESYNC && this.uid !== null) {
      this.raceId = null;
      this.ask(connection, now);
    } else if (code === Code.DISPLACED && (this.race.running || this.resuming)) {
      // Our own RESUME on another connection did that; its answer comes there, perhaps later than this.
      this.drop(connection);
      if (!this.race.running) this.suspectNow(now, error.message);
      else if (!this.asking()) this.askNext(now);
    } else if (code === Code.SUPERSEDED) {
      this.drop(connection);
      if (!this.asking()) {
        this.raceId = null;
        this.suspectNow(now, error.message);
      }
    } else if (isFinal(code) || FATAL.has(code) || (this.uid === null && FATAL_AT_FIRST.has(code))) {
      this.drop(connection);
      this.fail(refusal(error));
    } else {
      this.drop(connection);
      this.suspectNow(now, error.message);
      this.race.wait(now, error.retry_after ?? 1);
    }
  }

  private finish(event: MachineEvent): void {
    this.events.push(event);
    this.ended = true;
    this.active = null;
    for (const connection of [...this.connections.values()]) this.drop(connection);
  }

  // ---- streams -----------------------------------------------------------------------------------------------

  private sendInput(now: number): void {
    const connection = this.active;
    if (connection === null) return;
    const items = this.input.take();
    if (!items.length) return;
    this.vitals.traffic(now);
    for (const item of items) connection.link.send(item.type, connection.handle, item.position, item.payload);
    this.acknowledge(now, true);
  }

  private acknowledge(now: number, joining: boolean): void {
    const connection = this.active;
    if (connection === null) return;
    const position = this.intake.acknowledgement(now, joining);
    if (position !== null && this.log === this.nextLog) connection.link.send(Type.ACK, connection.handle, position, u64(position));
  }
}

/** Returns an ERROR frame's content as an error to throw. */
export function refusal(error: ErrorMessage): RefusedError {
  return new RefusedError(error.code, error.message, {
    retryAfter: error.retry_after,
    address: error.address,
    value: error.value,
  });
}

// The session machine against a node that is written down step by step: no sockets, and a clock of its own.

import assert from "node:assert/strict";
import test from "node:test";
import { ClientMachine, Code, Decoder, encodeFrame, messages, pack, Type } from "../dist/protocol.js";

const NODE = new Uint8Array(32).fill(1);
const UID = new Uint8Array(16).fill(2);
const bytes = (string) => new TextEncoder().encode(string);
const u64 = (value) => {
  const out = Buffer.alloc(8);
  out.writeBigUInt64BE(BigInt(value));
  return out;
};

class Rig {
  now = 1_000;
  open = new Map(); // connection number → decoder of what the machine sends on it
  dialled = [];
  dropped = [];
  events = [];
  frames = []; // [connection, frame]
  counter = 100n;
  raised = null;
  seeds = 0;

  constructor(wish = {}) {
    const identity = {
      public: new Uint8Array(33),
      device: new Uint8Array(32).fill(3),
      node: NODE,
      random: (count) => new Uint8Array(count).fill(++this.seeds),
    };
    this.machine = new ClientMachine({ credential: "t", want: "latest", agent: "a", ...wish }, identity, this.now);
    this.settle();
  }

  settle() {
    for (;;) {
      const action = this.machine.nextAction();
      if (action?.type === "dial") this.dialled.push(action.connection);
      else if (action?.type === "drop") {
        for (const part of action.last) this.note(action.connection, part);
        this.dropped.push(action.connection);
        this.open.delete(action.connection);
      } else if (action?.type === "prove") {
        if (action.atLeast !== null) this.counter = this.raised = action.atLeast;
        const proof = this.machine.proof(action.connection, action.ask, action.resume ? ++this.counter : 0n);
        this.machine.proved(action.connection, action.ask, new Uint8Array(64));
        assert.ok(proof);
      }
      if (action) continue;
      const out = this.machine.dataToSend();
      for (const [number, parts] of out) for (const part of parts) this.note(number, part);
      const event = this.machine.nextEvent();
      if (event) this.events.push(event);
      else if (!out.length) return;
    }
  }

  note(number, part) {
    if (!this.open.has(number)) this.open.set(number, new Decoder());
    for (const frame of this.open.get(number).feed(part)) this.frames.push([number, frame]);
  }

  connect(number = this.dialled.at(-1)) {
    this.machine.established(number, this.now);
    this.settle();
    return number;
  }

  send(number, type, handle, payload, seq = 0) {
    const body = payload instanceof Uint8Array ? payload : pack(payload);
    this.machine.receive(number, encodeFrame(type, handle, seq, body), this.now);
    this.settle();
  }

  wait(ms) {
    const end = this.now + ms;
    for (let due = this.machine.nextTimeout(); due !== null && due <= end; due = this.machine.nextTimeout()) {
      this.now = Math.max(due, this.now);
      this.machine.handleTimeout(this.now);
      this.settle();
    }
    this.now = end;
  }

  accept(more = {}) {
    const number = this.connect();
    this.send(number, Type.ACCEPT, 1, {
      uid: UID,
      log: 7n,
      kind: "pty",
      epoch: 1,
      node: NODE,
      name: "n",
      agent: "a",
      output: 0,
      input: 0,
      window: 262144,
      keepalive: 15,
      ...more,
    });
    this.take();
    return number;
  }

  /** Loses the connection and connects the next one; returns its number. */
  again(number) {
    this.machine.lost(number, this.now, "cut");
    this.settle();
    return this.connect();
  }

  resumed(number, more = {}, handle = 1) {
    this.send(number, Type.RESUMED, handle, { epoch: 1, log: 7n, output: 0, input: 0, ...more });
  }

  /** The frames of a type sent since the last time, and forgets all. */
  take(type) {
    const found = this.frames.filter(([, frame]) => frame.type === type).map(([, frame]) => frame);
    this.frames = [];
    return found;
  }

  happened(type) {
    const found = this.events.filter((event) => event.type === type);
    this.events = this.events.filter((event) => event.type !== type);
    return found;
  }
}

const body = (frame, shape) => messages.parse(shape, messages.parse(messages.Signed, frame.payload).body);

test("CONNECT is asked again with the same request when no answer comes", () => {
  const rig = new Rig();
  rig.connect();
  const [first] = rig.take(Type.CONNECT);
  rig.wait(2_100);
  assert.ok(rig.dropped.includes(1));
  rig.connect();
  const [second] = rig.take(Type.CONNECT);
  assert.deepEqual(body(second, messages.ConnectBody), body(first, messages.ConnectBody));
  rig.wait(9_000);
  assert.equal(rig.happened("failed")[0].error.code, Code.TIMEOUT);
});

test("output is delivered once, in order, and acknowledged when it is handled", () => {
  const rig = new Rig();
  const number = rig.accept({ output: 2 ** 32 - 2 });
  rig.send(number, Type.DATA, 1, bytes("abcd"), 2 ** 32 - 2);
  rig.send(number, Type.DATA, 1, bytes("cdef"), 0);
  rig.send(number, Type.DATA, 1, bytes("ab"), 2 ** 32 - 2);
  const output = rig.happened("output");
  assert.deepEqual(
    output.map((event) => [Buffer.from(event.data).toString(), event.end]),
    [
      ["abcd", 2 ** 32 + 2],
      ["ef", 2 ** 32 + 4],
    ],
  );
  rig.wait(1_000);
  assert.deepEqual(rig.take(Type.ACK), []);
  rig.machine.handled(2 ** 32 + 2, rig.now);
  rig.wait(249);
  assert.deepEqual(rig.take(Type.ACK), []);
  rig.wait(1);
  const [ack] = rig.take(Type.ACK);
  assert.deepEqual([ack.seq, Buffer.from(ack.payload)], [2, u64(2 ** 32 + 2)]);
});

test("a gap is a fault: ERROR on session 0, and RESUME where it was", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.send(number, Type.DATA, 1, bytes("ab"), 0);
  rig.send(number, Type.DATA, 1, bytes("xy"), 3);
  const [error] = rig.take(Type.ERROR);
  assert.equal(error.handle, 0);
  assert.equal(messages.parse(messages.ErrorMessage, error.payload).code, Code.GAP);
  assert.ok(rig.dropped.includes(number));
  assert.equal(rig.happened("trouble").at(-1).troubled, true);
  rig.connect();
  const [resume] = rig.take(Type.RESUME);
  const said = body(resume, messages.ResumeBody);
  assert.equal(said.output, 2);
  assert.equal(said.handled, 0, "received, and not dealt with yet");
  assert.equal(said.log, 7n);
});

test("input is sent again from where the node wants it", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.machine.write(bytes("hello"), rig.now);
  rig.machine.signal("INT", rig.now);
  rig.machine.write(bytes("world"), rig.now);
  rig.settle();
  assert.equal(rig.take(Type.DATA).length, 2);
  const next = rig.again(number);
  const [resume] = rig.take(Type.RESUME);
  assert.equal(body(resume, messages.ResumeBody).sent, 11);
  rig.resumed(next, { input: 3 });
  const sent = rig.frames
    .filter(([, frame]) => [Type.DATA, Type.SIGNAL].includes(frame.type))
    .map(([, frame]) => [frame.type, frame.seq]);
  assert.deepEqual(sent, [
    [Type.DATA, 3],
    [Type.SIGNAL, 5],
    [Type.DATA, 6],
  ]);
  assert.deepEqual(
    rig.happened("trouble").map((event) => event.troubled),
    [false, true, false],
  );
});

test("input that an agent that is gone may have had is named, and not sent again", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.machine.write(bytes("hello"), rig.now);
  rig.settle();
  rig.send(number, Type.ACK, 1, u64(2), 2);
  const next = rig.again(number);
  rig.take();
  rig.resumed(next, { input: null, state: "exited" });
  assert.deepEqual(rig.happened("uncertain"), [{ type: "uncertain", start: 2, end: 5 }]);
  assert.deepEqual(rig.take(Type.DATA), []);
});

test("the window: what does not fit waits for an acknowledgement", () => {
  const rig = new Rig();
  const number = rig.accept();
  assert.equal(rig.machine.write(new Uint8Array(300_000), rig.now), 262_144);
  rig.settle();
  assert.equal(rig.machine.eof(rig.now), false);
  rig.send(number, Type.ACK, 1, u64(10), 10);
  assert.equal(rig.happened("roomy").length, 1);
  assert.equal(rig.machine.write(new Uint8Array(300_000), rig.now), 10);
  rig.send(number, Type.ACK, 1, u64(2 ** 40), 0);
  assert.ok(rig.dropped.includes(number), "nobody acknowledges what was not sent");
});

test("counters rise; stale takes the node's, superseded goes on, resync resumes on the same connection", () => {
  const rig = new Rig();
  const number = rig.accept();
  const next = rig.again(number);
  const [first] = rig.take(Type.RESUME);
  rig.send(next, Type.ERROR, 1, { code: Code.STALE, name: "stale", message: "old", value: 5_000n });
  const [second] = rig.take(Type.RESUME);
  assert.equal(rig.raised, 5_000n);
  assert.equal(second.handle, 2);
  assert.equal(body(first, messages.ResumeBody).counter, 101n);
  assert.equal(body(second, messages.ResumeBody).counter, 5_001n);
  assert.notDeepEqual(body(first, messages.ResumeBody).race, body(second, messages.ResumeBody).race);
  rig.resumed(next, {}, 2);
  rig.take();
  rig.send(next, Type.ERROR, 2, { code: Code.RESYNC, name: "resync", message: "again" });
  const [third] = rig.take(Type.RESUME);
  assert.equal(third.handle, 3);
  rig.resumed(next, {}, 3);
  assert.ok(rig.machine.connected);
  const other = rig.again(next);
  rig.send(other, Type.ERROR, 1, { code: Code.SUPERSEDED, name: "superseded", message: "another was first" });
  assert.ok(!rig.machine.finished);
  rig.wait(1_100);
  rig.resumed(rig.connect());
  assert.ok(rig.machine.connected);
});

test("silence: PING, a race beside the old connection, and back when it answers", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.wait(1_000);
  const [ping] = rig.take(Type.PING);
  rig.wait(250);
  assert.deepEqual(
    rig.happened("trouble").map((event) => event.troubled),
    [false, true],
  );
  assert.ok(rig.dialled.length >= 2);
  assert.ok(rig.machine.connected, "the old one stays");
  const again = rig.take(Type.PING).at(-1);
  rig.send(number, Type.PONG, 0, again.payload);
  assert.deepEqual(
    rig.happened("trouble").map((event) => event.troubled),
    [false],
  );
  rig.send(number, Type.PING, 0, ping.payload);
  assert.deepEqual(rig.take(Type.PONG)[0].payload, ping.payload);
});

test("our own RESUME displaces the old connection: that is not the end", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.machine.suspect(rig.now, "the network changed");
  rig.settle();
  const next = rig.connect();
  assert.equal(rig.take(Type.RESUME).length, 1);
  rig.send(number, Type.ERROR, 1, { code: Code.DISPLACED, name: "displaced", message: "connected again" });
  assert.ok(!rig.machine.finished);
  rig.resumed(next);
  assert.ok(rig.machine.connected);
  rig.send(next, Type.ERROR, 1, { code: Code.DISPLACED, name: "displaced", message: "another device" });
  assert.equal(rig.happened("failed")[0].error.codeName, "displaced");
});

test("snapshots and gaps move our place in the output", () => {
  const rig = new Rig();
  const number = rig.accept({ snapshot: true });
  rig.send(number, Type.SNAPSHOT, 1, {
    position: 90,
    part: 0,
    last: false,
    data: bytes("scr"),
    lost: { start: 0, end: 90 },
  });
  rig.send(number, Type.SNAPSHOT, 1, { position: 90, part: 1, data: bytes("een") });
  assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: 0, end: 90 }]);
  const [screen] = rig.happened("screen");
  assert.equal(Buffer.from(screen.data).toString(), "screen");
  rig.send(number, Type.DATA, 1, bytes("x"), 90);
  assert.equal(rig.happened("output")[0].end, 91);
  const next = rig.again(number);
  rig.resumed(next, { output: 500, log: 8n, lost: { start: 91, end: 500 }, head: 500 });
  assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: 91, end: 500 }]);
  assert.equal(rig.machine.intake.next, 500);
  rig.send(next, Type.SNAPSHOT, 1, { position: 600, lost: { start: 500, end: 600 } });
  assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: 500, end: 600 }]);
  assert.deepEqual(rig.happened("screen"), []);
});

test("a snapshot has so many parts and bytes, and no more", () => {
  const parts = Math.floor((8 * 1024 * 1024) / 60_000) + 1;
  const give = (count, size) => {
    const rig = new Rig();
    const number = rig.accept({ snapshot: true });
    for (let part = 0; part < count; part++) {
      rig.send(number, Type.SNAPSHOT, 1, { position: 0, part, last: false, data: new Uint8Array(size) });
    }
    return [rig, number];
  };
  for (const [count, size] of [
    [parts + 1, 0],
    [parts, 60_000],
  ]) {
    const [rig] = give(count, size);
    assert.ok(!rig.machine.connected);
    assert.match(rig.happened("trouble").at(-1).reason, /too large, or has too many parts/);
  }
  const [rig, number] = give(parts - 1, 60_000);
  rig.send(number, Type.SNAPSHOT, 1, { position: 0, part: parts - 1, last: true, data: new Uint8Array(0) });
  assert.equal(rig.happened("screen")[0].data.length, (parts - 1) * 60_000);
  assert.ok(rig.machine.connected);
});

test("what a promised picture stands for is named once, and asked for again if it does not come", () => {
  for (const log of [7n, 8n]) {
    const rig = new Rig();
    const number = rig.accept();
    rig.send(number, Type.DATA, 1, bytes("0123456789"), 0);
    const next = rig.again(number);
    rig.resumed(next, { output: 50, log, lost: { start: 4, end: 50 }, snapshot: true, head: 80 });
    rig.send(next, Type.SNAPSHOT, 1, { position: 80, last: false, data: bytes("pic"), lost: { start: 4, end: 80 } });
    assert.deepEqual(rig.happened("gap"), []);
    assert.equal(rig.machine.intake.next, 10);
    const last = rig.again(next);
    assert.equal(rig.machine.log, 7n);
    rig.resumed(last, { output: 60, log, lost: { start: 4, end: 60 }, snapshot: true, head: 90 });
    rig.send(last, Type.SNAPSHOT, 1, { position: 90, data: bytes("picture"), lost: { start: 4, end: 90 } });
    assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: log === 7n ? 10 : 4, end: 90 }]);
    assert.deepEqual([rig.machine.intake.next, rig.machine.log], [90, log]);
  }
});

test("output that the old connection brought after RESUME was sent is neither lost nor twice", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.send(number, Type.DATA, 1, bytes("ab"), 0);
  rig.machine.suspect(rig.now, "the network changed");
  rig.settle();
  const next = rig.connect();
  assert.equal(body(rig.take(Type.RESUME)[0], messages.ResumeBody).output, 2);
  rig.send(number, Type.DATA, 1, bytes("cd"), 2);
  rig.resumed(next, { output: 2, head: 6 });
  rig.send(next, Type.DATA, 1, bytes("cdef"), 2);
  assert.equal(
    rig
      .happened("output")
      .map((event) => Buffer.from(event.data).toString())
      .join(""),
    "abcdef",
  );
});

test("refusals: some for good, some for now", () => {
  for (const [code, atFirst, later] of [
    [Code.DENIED, true, true],
    [Code.EXPIRED, true, true],
    [Code.READ_ONLY, true, true],
    [Code.BUSY, false, false],
    [Code.DRAINING, false, false],
    [Code.STORAGE, true, false],
    [Code.RATE_LIMITED, true, false],
    [99, false, false],
  ]) {
    const first = new Rig();
    first.send(first.connect(), Type.ERROR, 1, { code, name: "?", message: "no", retry_after: 3 });
    assert.equal(first.machine.finished, atFirst, `code ${code} at first`);
    const rig = new Rig();
    const number = rig.accept();
    const dials = rig.dialled.length;
    rig.send(number, Type.ERROR, 1, { code, name: "?", message: "no", retry_after: 3 });
    assert.equal(rig.machine.finished, later, `code ${code} later`);
    if (later) continue;
    rig.wait(2_900);
    assert.equal(rig.dialled.length, dials + 1, "it waits as long as it was asked to");
    rig.wait(200);
    assert.ok(rig.dialled.length > dials + 1);
  }
});

test("the end: CLOSE with its status, answered once it was read", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.send(number, Type.DATA, 1, bytes("bye"), 0);
  rig.send(number, Type.CLOSE, 1, { code: Code.ENDED, reason: "The program ended.", status: 3, output: 3 });
  assert.equal(rig.happened("ended")[0].close.status, 3);
  rig.machine.handled(3, rig.now);
  rig.machine.confirmEnd();
  rig.settle();
  assert.deepEqual(
    rig.frames.map(([, frame]) => frame.type),
    [Type.ACK, Type.CLOSE],
  );
  assert.ok(rig.dropped.includes(number));
});

test("leaving: SUSPEND with what was handled, and its answer; without an answer it is over, too", () => {
  for (const answer of [true, false]) {
    const rig = new Rig();
    const number = rig.accept();
    rig.send(number, Type.DATA, 1, bytes("abc"), 0);
    rig.machine.handled(2, rig.now);
    rig.machine.suspend(rig.now);
    rig.settle();
    const [frame] = rig.take(Type.SUSPEND);
    assert.equal(messages.parse(messages.Suspend, frame.payload).position, 2);
    if (answer) rig.send(number, Type.SUSPEND, 1, { position: 0 });
    else rig.wait(2_000);
    assert.equal(rig.happened("suspended").length, 1);
    assert.ok(rig.machine.finished);
    assert.equal(rig.machine.nextTimeout(), null);
  }
});

test("bytes that make no sense end the connection, never the session", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.machine.receive(number, bytes("GET / HTTP/1.1\r\n"), rig.now);
  rig.settle();
  assert.ok(rig.dropped.includes(number));
  assert.ok(!rig.machine.finished);
  rig.resumed(rig.connect());
  assert.ok(rig.machine.connected);
});

test("a client that was ahead of the node's log takes what takes its place", () => {
  const rig = new Rig();
  const number = rig.accept();
  rig.send(number, Type.DATA, 1, bytes("0123456789"), 0);
  const next = rig.again(number);
  rig.resumed(next, { head: 8, lost: { start: 4, end: 8 } });
  assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: 8, end: 8 }]);
  rig.happened("output");
  rig.send(next, Type.DATA, 1, bytes("new bytes, more"), 0);
  const [output] = rig.happened("output");
  assert.deepEqual([Buffer.from(output.data).toString(), output.end], ["new bytes, more", 15]);
});

test("nothing is acknowledged in a log that the client is not in yet", () => {
  for (const log of [7n, 8n]) {
    const rig = new Rig();
    const number = rig.accept();
    rig.send(number, Type.DATA, 1, bytes("0123456789"), 0);
    const next = rig.again(number);
    rig.resumed(next, { output: 50, log, lost: { start: 10, end: 50 }, snapshot: true, head: 80 });
    const acknowledged = (position) => {
      rig.machine.handled(position, rig.now);
      rig.wait(250);
      return rig.take(Type.ACK).map((frame) => Buffer.from(frame.payload));
    };
    assert.deepEqual(acknowledged(10), log === 7n ? [u64(10)] : []);
    rig.send(next, Type.SNAPSHOT, 1, { position: 80, data: bytes("picture"), lost: { start: 10, end: 80 } });
    rig.send(next, Type.DATA, 1, bytes("more"), 80);
    assert.deepEqual(acknowledged(84), [u64(84)]);
  }
});

test("of a forgotten lane exactly what may be lost is named", () => {
  for (const forgotten of [true, false]) {
    const rig = new Rig();
    const number = rig.accept();
    rig.machine.write(bytes("0123456789"), rig.now);
    rig.settle();
    rig.send(number, Type.ACK, 1, u64(2), 2);
    const next = rig.again(number);
    rig.take();
    rig.resumed(next, { input: 6, forgotten });
    assert.deepEqual(rig.happened("uncertain"), forgotten ? [{ type: "uncertain", start: 2, end: 6 }] : []);
    const sent = rig.take(Type.DATA).map((frame) => [frame.seq, Buffer.from(frame.payload).toString()]);
    assert.deepEqual(sent, [[6, "6789"]]);
  }
});

test("a picture names only what it stands for itself", () => {
  const rig = new Rig();
  const number = rig.accept({ snapshot: true });
  const half = { position: 50, last: false, data: bytes("never whole"), lost: { start: 0, end: 50 } };
  rig.send(number, Type.SNAPSHOT, 1, half);
  rig.send(number, Type.SNAPSHOT, 1, { position: 60, data: bytes("whole") });
  assert.deepEqual(rig.happened("gap"), []);
  rig.send(number, Type.SNAPSHOT, 1, { position: 90, data: bytes("one"), lost: { start: 60, end: 90 } });
  rig.send(number, Type.SNAPSHOT, 1, { position: 95, data: bytes("next") });
  assert.deepEqual(rig.happened("gap"), [{ type: "gap", start: 60, end: 90 }]);
  assert.deepEqual(
    rig.happened("screen").map((event) => Buffer.from(event.data).toString()),
    ["whole", "one", "next"],
  );
});

// Sessions over a platform that the test plays: what the caller sees, and what is acknowledged when.

import assert from "node:assert/strict";
import test from "node:test";
import { callerWith, connectWith } from "../dist/session.js";
import { MemoryStorage } from "../dist/node.js";
import { Code, Decoder, encodeFrame, messages, pack, Type } from "../dist/protocol.js";

const NODE = new Uint8Array(32).fill(1);
const UID = new Uint8Array(16).fill(2);
const bytes = (string) => new TextEncoder().encode(string);
const soon = () => new Promise((resolve) => setTimeout(resolve, 5));

/** A platform whose connections the test answers. */
class Stage {
  transport = "tls";
  wires = [];
  watched = 0;
  accept = {};

  storage = async () => new MemoryStorage();
  watch = () => {
    this.watched += 1;
    return () => (this.watched -= 1);
  };
  label = () => "stage";
  find = async () => ({
    name: "stage",
    node: NODE,
    pacing: { everyMs: 50, openMax: 20 },
    dial: (hears) => this.dial(hears),
  });

  dial(hears) {
    const decoder = new Decoder();
    const wire = {
      hears,
      frames: [],
      closed: false,
      send: (parts) => {
        for (const part of parts) for (const frame of decoder.feed(part)) this.got(wire, frame);
      },
      close: () => (wire.closed = true),
      say: (type, handle, payload, seq = 0) =>
        hears.data(encodeFrame(type, handle, seq, payload instanceof Uint8Array ? payload : pack(payload))),
    };
    this.wires.push(wire);
    setImmediate(() => (this.refuses ? hears.failed(this.refuses, { refused: true }) : hears.open()));
    return wire;
  }

  got(wire, frame) {
    wire.frames.push(frame);
    const signed = [Type.CONNECT, Type.RESUME].includes(frame.type)
      ? messages.parse(messages.Signed, frame.payload).body
      : null;
    if (frame.type === Type.CONNECT) {
      this.asked = messages.parse(messages.ConnectBody, signed);
      wire.say(Type.ACCEPT, 1, {
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
        mode: this.asked.mode,
        ...this.accept,
      });
    } else if (frame.type === Type.RESUME) {
      this.back = messages.parse(messages.ResumeBody, signed);
      wire.say(Type.RESUMED, 1, {
        epoch: 1,
        log: 7n,
        output: this.back.output,
        input: 0,
        head: this.head ?? this.back.output,
      });
    } else if (frame.type === Type.CALL) {
      const { id, method } = messages.parse(messages.Call, frame.payload);
      wire.say(
        Type.RESULT,
        0,
        method === "bad" ? { id, error: { code: 30, name: "not_found", message: "no" } } : { id, value: { method } },
      );
    } else if (frame.type === Type.SUSPEND) wire.say(Type.SUSPEND, 1, { position: 0 });
  }

  sent(type) {
    return this.wires.flatMap((wire) => wire.frames).filter((frame) => frame.type === type);
  }

  connect(more = {}) {
    return connectWith(this, { host: "h", token: "t", agent: "a", ...more });
  }
}

test("what comes before the handlers is kept for them, and acknowledged only when they are done", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const [wire] = stage.wires;
  wire.say(Type.DATA, 1, bytes("a".repeat(65_535)), 0);
  wire.say(Type.DATA, 1, bytes("b".repeat(10)), 65_535);
  await soon();
  assert.equal(stage.sent(Type.ACK).length, 0);
  const seen = [];
  const releases = [];
  session.on("open", (about) => seen.push(["open", about.name, about.uid]));
  session.on("data", (data, position) => {
    seen.push([data.length, position]);
    return new Promise((resolve) => releases.push(resolve));
  });
  await soon();
  assert.deepEqual(seen, [
    ["open", "n", "02".repeat(16)],
    [65_535, 0],
  ]);
  assert.equal(session.position, 0);
  releases[0]();
  await soon();
  assert.deepEqual(seen.at(-1), [10, 65_535]);
  assert.equal(stage.sent(Type.ACK).length, 0);
  releases[1]();
  await soon();
  assert.equal(stage.sent(Type.ACK)[0].seq, 65_545);
  await session.suspend();
  assert.equal(session.state, "suspended");
  assert.equal(stage.watched, 0);
});

test("output before the head is history, after a resume, too", async () => {
  const stage = new Stage();
  stage.accept = { head: 4 };
  const session = await stage.connect();
  const seen = [];
  session.on("data", (data, position, replayed) => seen.push([position, replayed]));
  const [wire] = stage.wires;
  wire.say(Type.DATA, 1, bytes("abcd"), 0);
  wire.say(Type.DATA, 1, bytes("ef"), 4);
  await soon();
  stage.head = 8;
  wire.hears.ended("gone");
  await soon();
  await soon();
  const again = stage.wires.find((one) => one.frames.some(({ type }) => type === Type.RESUME));
  again.say(Type.DATA, 1, bytes("gh"), 6);
  again.say(Type.DATA, 1, bytes("i"), 8);
  await soon();
  assert.deepEqual(seen, [
    [0, true],
    [4, false],
    [6, true],
    [8, false],
  ]);
  await session.suspend();
});

test("questions are asked without a session", async () => {
  const stage = new Stage();
  const caller = await callerWith(stage, { host: "h", token: "t" });
  assert.deepEqual(await caller.call("list", {}), { method: "list" });
  assert.equal(stage.asked.want, "call");
  await assert.rejects(caller.call("bad", {}), /no/);
  caller.close();
  assert.equal(stage.wires[0].closed, true);
});

test("snapshot, gap, data and end come in the order they were sent", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const seen = [];
  for (const type of ["snapshot", "gap", "end"])
    session.on(type, (value) => seen.push([type, value instanceof Uint8Array ? Buffer.from(value).toString() : value]));
  session.on("data", async (data) => {
    await soon();
    seen.push(["data", Buffer.from(data).toString()]);
  });
  const [wire] = stage.wires;
  wire.say(Type.DATA, 1, bytes("x"), 0);
  wire.say(Type.SNAPSHOT, 1, {
    position: 9,
    lost: { start: 1, end: 9 },
    zstd: true,
    data: Buffer.from("28b52ffd20021100006869", "hex"),
  });
  wire.say(Type.DATA, 1, bytes("y"), 9);
  wire.say(Type.CLOSE, 1, { code: 34, reason: "The program ended.", signal: 9, output: 10 });
  await session.closed;
  assert.deepEqual(
    seen.map(([type]) => type),
    ["data", "gap", "snapshot", "data", "end"],
  );
  assert.equal(seen[2][1], "hi", "it is decompressed");
  assert.deepEqual(seen.at(-1)[1], { status: null, signal: 9, reason: "The program ended.", code: 34 });
  assert.equal(session.state, "ended");
  await assert.rejects(session.write("x"), { codeName: "ended" });
});

test("a handler that fails ends the attachment: what it did not handle is not acknowledged", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const errors = [];
  session.on("error", (error) => errors.push(error));
  session.on("data", () => Promise.reject(new Error("the disk is full")));
  stage.wires[0].say(Type.DATA, 1, bytes("x"), 0);
  await session.closed;
  assert.match(errors[0].message, /the disk is full/);
  assert.equal(session.position, 0);
  assert.equal(stage.sent(Type.ACK).length, 0);
});

test("typing waits for room, and goes on over another connection", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const troubles = [];
  session.on("trouble", (trouble) => troubles.push(trouble));
  session.on("data", () => undefined);
  let done = false;
  const writing = session.write(new Uint8Array(300_000)).then(() => (done = true));
  const marked = session.signal("INT");
  await soon();
  assert.equal(done, false);
  stage.wires[0].hears.ended("cut");
  assert.equal(session.state, "trouble");
  for (let turn = 0; turn < 100 && session.state !== "open"; turn++) await soon();
  assert.equal(session.state, "open");
  assert.equal(troubles.length, 2);
  assert.ok(troubles[0].since <= Date.now());
  assert.equal(troubles[1], null);
  const wire = stage.wires.find((each) => each.frames.some((frame) => frame.type === Type.RESUME));
  wire.say(Type.ACK, 1, Buffer.from("0000000000010000", "hex"), 65_536);
  await writing;
  await marked;
  assert.equal(
    wire.frames.filter((frame) => frame.type === Type.DATA).reduce((sum, frame) => sum + frame.payload.length, 0),
    300_000,
  );
  assert.equal(wire.frames.find((frame) => frame.type === Type.SIGNAL).seq, 300_000);
  await session.suspend();
});

test("after the end was told, that the node forgot the session is no error", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const errors = [];
  session.on("error", (error) => errors.push(error));
  session.on("data", () => undefined);
  session.on("end", soon);
  const [wire] = stage.wires;
  wire.say(Type.CLOSE, 1, { code: 34, status: 0, output: 0 });
  wire.say(Type.ERROR, 1, { code: 34, name: "ended", message: "This session was closed." });
  await session.closed;
  assert.equal(session.state, "ended");
  assert.deepEqual(errors, []);
});

test("a handler that throws stops nothing", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const thrown = [];
  const real = globalThis.setTimeout;
  globalThis.setTimeout = (what, ms) =>
    real(() => {
      try {
        what();
      } catch (error) {
        thrown.push(error.message);
      }
    }, ms);
  session.on("presence", () => {
    throw new Error("the caller's own");
  });
  let text = "";
  session.on("data", (data) => (text += Buffer.from(data)));
  const [wire] = stage.wires;
  wire.hears.data(
    Buffer.concat([
      encodeFrame(Type.EVENT, 1, 0, pack({ kind: "joined", label: "a" })),
      encodeFrame(Type.DATA, 1, 0, bytes("x")),
    ]),
  );
  await soon();
  globalThis.setTimeout = real;
  assert.deepEqual(thrown, ["the caller's own"]);
  assert.equal(text, "x");
  await session.suspend();
});

test("calls go over a connection of their own; refusals are errors", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  assert.deepEqual(await Promise.all([session.call("list"), session.call("info", { session: "n" })]), [
    { method: "list" },
    { method: "info" },
  ]);
  await assert.rejects(session.call("bad"), { codeName: "not_found" });
  assert.equal(stage.asked.want, "call");
  assert.equal(stage.sent(Type.CONNECT).length, 2);
  await session.suspend();
  assert.ok(stage.wires.every((wire) => wire.closed));
});

test("who is let in no more asks nothing further, and is told at once", async () => {
  const stage = new Stage();
  const caller = await callerWith(stage, { host: "h", token: "t" });
  assert.deepEqual(await caller.call("list"), { method: "list" });
  const told = [];
  caller.onrefused = (error) => told.push(error.codeName);
  stage.wires[0].say(Type.ERROR, 0, { code: Code.REVOKED, name: "revoked", message: "It was revoked." });
  assert.deepEqual(told, ["revoked"]);
  await assert.rejects(caller.call("list"), { codeName: "revoked" });
  assert.equal(stage.wires.length, 1);
});

test("a session whose device was revoked makes no further connection", async () => {
  const stage = new Stage();
  const session = await stage.connect();
  const errors = [];
  session.on("error", (error) => errors.push(error.codeName));
  stage.wires[0].say(Type.ERROR, 0, { code: Code.REVOKED, name: "revoked", message: "It was revoked." });
  await session.closed;
  assert.deepEqual([session.state, errors, stage.wires.length], ["failed", ["revoked"], 1]);
});

test("what is asked for: latest, new, named, join, a link", async () => {
  const link = `sterna://h/?s=${Buffer.from(UID).toString("base64url")}&m=watch#t=${"A".repeat(43)}`;
  for (const [options, want, mode] of [
    [{}, "latest", "drive"],
    [{ create: true }, "new", "drive"],
    [{ name: "x" }, "named", "drive"],
    [{ name: "x", create: false }, "join", "drive"],
    [{ session: "build" }, "join", "drive"],
    [{ session: "02".repeat(16), mode: "watch" }, "join", "watch"],
    [{ url: link, host: undefined, token: undefined, agent: undefined }, "join", "watch"],
  ]) {
    const stage = new Stage();
    const session = await stage.connect(options);
    assert.deepEqual([stage.asked.want, stage.asked.mode, session.mode], [want, mode, mode]);
    await session.suspend();
  }
  await assert.rejects(new Stage().connect({ token: undefined }), { codeName: "bad_request" });
  await assert.rejects(new Stage().connect({ session: new Uint8Array(3) }), { codeName: "bad_request" });
});

test("a node that nobody reaches, and an attempt that is given up", async () => {
  const { ConnectionLostError } = await import("../dist/node.js");
  const stage = new Stage();
  stage.refuses = new ConnectionLostError("The node at h cannot be reached: ECONNREFUSED.");
  await assert.rejects(stage.connect(), { codeName: "unreachable", message: /ECONNREFUSED/ });
  const silent = new Stage();
  silent.got = () => undefined;
  const controller = new AbortController();
  const attempt = silent.connect({ abort: controller.signal });
  setTimeout(() => controller.abort(), 20);
  await assert.rejects(attempt, /given up/);
  assert.ok(silent.wires.every((wire) => wire.closed));
});

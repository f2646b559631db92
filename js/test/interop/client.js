// One client for the tests of tests/e2e/test_js_client.py: does what its first argument (JSON) says, prints JSON lines.

import { createHash } from "node:crypto";
import { closeSync, openSync, readSync, writeSync } from "node:fs";
import { WebKey } from "../../dist/device.js";
import { connect, MemoryStorage } from "../../dist/node.js";

const job = JSON.parse(process.argv[2]);

/** A device as in a browser that has no Ed25519. */
class Curve extends MemoryStorage {
  async loadKey() {
    const algorithm = { name: "ECDSA", namedCurve: "P-256" };
    return WebKey.of(await crypto.subtle.generateKey(algorithm, false, ["sign", "verify"]));
  }
}
if (job.p256) job.connect.storage = new Curve();

function say(what) {
  process.stdout.write(`${JSON.stringify(what, (_, value) => (typeof value === "bigint" ? String(value) : value))}\n`);
}

function told(error) {
  return { code: error.codeName, message: error.message, stack: error.codeName ? undefined : error.stack };
}

/** Everything that a session says beside its bytes, in order. */
function watch(session, seen) {
  for (const type of ["open", "gap", "uncertain", "presence", "trouble", "end", "error"]) {
    session.on(type, (value) => seen.push([type, value instanceof Error ? told(value) : value]));
  }
  session.on("snapshot", (data, position) => seen.push(["snapshot", { text: Buffer.from(data).toString(), position }]));
}

/** Collects output; `until(text)` resolves once it is there. */
function reader(session) {
  const state = { text: "", waiting: null };
  const look = () => {
    if (state.waiting && state.text.includes(state.waiting.text)) {
      state.waiting.resolve();
      state.waiting = null;
    }
  };
  session.on("data", (data) => {
    state.text += Buffer.from(data).toString();
    look();
  });
  return {
    state,
    until: (text) =>
      new Promise((resolve) => {
        state.waiting = { text, resolve };
        look();
      }),
  };
}

const scenarios = {
  /** Types, reads the answer, asks the node, is told of the end. */
  async echo() {
    const session = await connect(job.connect);
    const seen = [];
    watch(session, seen);
    const { until } = reader(session);
    await session.write("stty size; echo mark-$((40+2))\r");
    await until("mark-42");
    session.resize(101, 37);
    await session.write("stty size; echo size-$((1+1))\r");
    await until("37 101");
    await until("size-2");
    await session.write("sleep 100\r");
    await until("sleep 100");
    await new Promise((resolve) => setTimeout(resolve, 300));
    await session.signal("INT");
    await session.write("echo still-$((1+2))\r");
    await until("still-3");
    const { sessions } = await session.call("list");
    const info = await session.call("info", { session: session.uid });
    const refused = await session.call("nonsense").catch(told);
    await session.write("exit 7\r");
    await session.closed;
    const { uid, name, kind, mode, state } = session;
    const late = await session.write("x").catch(told);
    say({ uid, name, kind, mode, state, sessions, info, refused, late, seen });
  },

  /** Sends a file and keeps what comes in another, to the end. */
  async copy() {
    const session = await connect(job.connect);
    const seen = [];
    watch(session, seen);
    const out = openSync(job.out, "w");
    const hash = createHash("sha256");
    let count = 0;
    let next = null;
    session.on("data", (data, position) => {
      if (position !== (next ?? position)) seen.push(["wrong", [position, next]]);
      next = position + data.length;
      count += data.length;
      hash.update(data);
      writeSync(out, data);
      const reported = job.report && Math.floor(count / job.report) !== Math.floor((count - data.length) / job.report);
      if (reported) say({ count });
      // Output that is dealt with later is acknowledged later: now and then the disk is slow.
      return reported || count % 7 === 0 ? new Promise((resolve) => setTimeout(resolve, reported ? 20 : 5)) : undefined;
    });
    say({ open: session.uid });
    const file = openSync(job.in, "r");
    const block = Buffer.alloc(100_000);
    for (let size = readSync(file, block); size; size = readSync(file, block))
      await session.write(block.subarray(0, size));
    await session.eof();
    await session.closed;
    closeSync(out);
    say({ state: session.state, count, sha256: hash.digest("hex"), seen });
  },

  /** Leaves, and comes again as another attachment. */
  async suspend() {
    const first = await connect(job.connect);
    const { until } = reader(first);
    await first.write("V=kept; echo mark-$((40+2))\r");
    await until("mark-42");
    await first.suspend();
    const left = await first.write("x").catch(told);
    const second = await connect({ ...job.connect, session: first.uid });
    const seen = [];
    watch(second, seen);
    const again = reader(second);
    await second.write("echo again-$V\r");
    await again.until("again-kept");
    await second.suspend();
    say({
      first: first.state,
      second: second.state,
      same: first.uid === second.uid,
      created: second.created,
      left,
      seen,
    });
  },

  /** Watches while somebody else types; then tries to type in spite of it. */
  async watch() {
    const driver = await connect(job.connect);
    const typed = reader(driver);
    await driver.write("echo mark-$((40+2))\r");
    await typed.until("mark-42");
    const watcher = await connect({ ...job.connect, session: driver.uid, mode: "watch" });
    const seen = [];
    watch(watcher, seen);
    const shown = reader(watcher);
    await driver.write("echo more-$((1+2))\r");
    await shown.until("more-3");
    const local = await watcher.write("echo never\r").catch(told);
    watcher.run(() => watcher.machine.write(new TextEncoder().encode("echo never-$((1+3))\r"), performance.now()));
    await watcher.closed;
    await driver.write("echo last-$((1+4))\r");
    await typed.until("last-5");
    await driver.suspend();
    say({ local, mode: watcher.mode, state: watcher.state, typed: typed.state.text, seen });
  },

  /** Loses the connection while a program writes more than the node keeps. */
  async away() {
    const session = await connect(job.connect);
    const seen = [];
    watch(session, seen);
    const { state, until } = reader(session);
    const painted = new Promise((resolve) => session.on("snapshot", resolve));
    await session.write("sleep 1; seq 1 400000; echo done-$((1+1)); touch written\r");
    await until("sleep 1; seq"); // a shell breaks what is beyond the right edge
    say({ typed: true });
    await painted;
    await session.write("echo still-$((1+2))\r");
    await until("still-3");
    await session.suspend();
    say({ seen, text: state.text });
  },

  /** Tries each of several ways in; says what became of it. */
  async tries() {
    const results = [];
    for (const options of job.tries) {
      try {
        const session = await connect({ ...job.connect, ...options });
        results.push({ name: session.name, mode: session.mode });
        await session.suspend();
      } catch (error) {
        results.push(told(error));
      }
    }
    say(results);
  },

  /** Holds output back: nothing of it may be acknowledged, so the window stops the agent. */
  async hold() {
    const session = await connect(job.connect);
    let release;
    const held = new Promise((resolve) => (release = resolve));
    let count = 0;
    session.on("data", async (data) => {
      await held;
      count += data.length;
    });
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    const { next, handled, acked } = session.machine.intake;
    release();
    await session.closed;
    say({ next, handled, acked, count });
  },
};

scenarios[job.scenario]().catch((error) => {
  say({ failed: told(error) });
  process.exitCode = 1;
});

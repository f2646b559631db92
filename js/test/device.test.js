import assert from "node:assert/strict";
import { createPublicKey, verify } from "node:crypto";
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";
import { WebKey } from "../dist/device.js";
import { DirectoryStorage, fingerprint, MemoryStorage, parseLink, parseNodeId } from "../dist/node.js";
import { IndexedStorage } from "../dist/browser.js";

const SPKI = { 1: "302a300506032b6570032100", 2: "3059301306072a8648ce3d020106082a8648ce3d030107034200" };
const DATA = new TextEncoder().encode("clawterm/1 CONNECT and more");

function holds(wire, signature) {
  const der = Buffer.concat([Buffer.from(SPKI[wire[0]], "hex"), wire.subarray(1)]);
  const key = createPublicKey({ key: der, format: "der", type: "spki" });
  return (
    signature.length === 64 &&
    verify(wire[0] === 2 ? "sha256" : null, DATA, { key, dsaEncoding: "ieee-p1363" }, signature)
  );
}

async function inDirectory(what) {
  const directory = mkdtempSync(join(tmpdir(), "sterna-js-"));
  try {
    await what(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

test("WebCrypto keys of both kinds sign what a node checks", async () => {
  const p256 = await crypto.subtle.generateKey({ name: "ECDSA", namedCurve: "P-256" }, false, ["sign", "verify"]);
  const keys = [await new MemoryStorage().loadKey(), await WebKey.of(p256)];
  assert.deepEqual(
    keys.map((key) => [key.public[0], key.public.length]),
    [
      [1, 33],
      [2, 66],
    ],
  );
  for (const key of keys) assert.ok(holds(key.public, await key.sign(DATA)));
});

test("a directory keeps one key, whoever comes first, and a counter that rises", () =>
  inDirectory(async (base) => {
    const directory = join(base, "state");
    const keys = await Promise.all(Array.from({ length: 8 }, () => new DirectoryStorage(directory).loadKey()));
    for (const key of keys) assert.deepEqual(key.public, keys[0].public);
    assert.ok(holds(keys[0].public, await keys[0].sign(DATA)));
    const path = join(directory, "device.key");
    assert.match(readFileSync(path, "ascii"), /^ed25519 [0-9a-f]{64}\n$/);
    assert.equal(statSync(path).mode & 0o777, 0o600);
    assert.equal(statSync(directory).mode & 0o777, 0o700);
    const storage = new DirectoryStorage(directory);
    assert.deepEqual(await Promise.all([1, 2, 3].map(() => storage.nextCounter(1000n))), [1000n, 1001n, 1002n]);
    await storage.raiseCounter(5000n);
    assert.equal(await new DirectoryStorage(directory).nextCounter(1000n), 5001n);
    await storage.raiseCounter(10n);
    assert.equal(await storage.nextCounter(9000n), 9000n);
    await assert.rejects(async () => storage.raiseCounter(2n ** 63n - 1n), { codeName: "denied" });
    assert.deepEqual(readdirSync(directory).sort(), ["device.counter", "device.key"]);
  }));

test("keys that others can read, or that are damaged, are not used", () =>
  inDirectory(async (base) => {
    const directory = join(base, "state");
    await new DirectoryStorage(directory).loadKey();
    const path = join(directory, "device.key");
    chmodSync(path, 0o644);
    await assert.rejects(new DirectoryStorage(directory).loadKey(), /chmod 600/);
    chmodSync(path, 0o600);
    writeFileSync(path, "ed25519 00\n");
    await assert.rejects(new DirectoryStorage(directory).loadKey(), /damaged/);
    chmodSync(directory, 0o755);
    await assert.rejects(new DirectoryStorage(directory).loadKey(), /chmod 700/);
  }));

test("a damaged pin is not taken for an unknown node", () =>
  inDirectory(async (base) => {
    const storage = new DirectoryStorage(base);
    writeFileSync(join(base, "known_nodes"), "a.example:1 nonsense AAAA\n", { mode: 0o600 });
    await assert.rejects(storage.pin("a.example:1"), /damaged/);
    assert.equal(await storage.pin("b.example:1"), null);
  }));

/** As much of IndexedDB as the storage uses, with its order of events; values are cloned as a browser does. */
class FakeIndexedDB {
  stores = new Map();
  waiting = Promise.resolve();

  open() {
    const asked = {};
    const fresh = !this.stores.size;
    const database = {
      createObjectStore: (name) => this.stores.set(name, new Map()),
      transaction: (name) => this.transaction(this.stores.get(name)),
    };
    queueMicrotask(() => {
      asked.result = database;
      if (fresh) asked.onupgradeneeded();
      asked.onsuccess();
    });
    return asked;
  }

  /** Transactions run one after another, each over all of its requests. */
  transaction(values) {
    const requests = [];
    const transaction = {
      abort: () => (transaction.aborted = true),
      objectStore: () => ({
        get: (key) => {
          const asked = {};
          requests.push(() => {
            asked.result = values.get(key);
            asked.onsuccess?.();
          });
          return asked;
        },
        put: (value, key) => requests.push(() => values.set(key, structuredClone(value))),
      }),
    };
    this.waiting = this.waiting.then(async () => {
      await new Promise((resolve) => setImmediate(resolve));
      while (requests.length && !transaction.aborted) requests.shift()();
      if (transaction.aborted) transaction.onabort();
      else transaction.oncomplete();
    });
    return transaction;
  }
}

test("a browser keeps a key that nobody can read, one for all tabs", async () => {
  globalThis.indexedDB = new FakeIndexedDB();
  try {
    const tabs = [new IndexedStorage(), new IndexedStorage(), new IndexedStorage()];
    const keys = [];
    for (const key of await Promise.all(tabs.map((tab) => tab.loadKey()))) keys.push(key);
    for (const key of keys) {
      assert.deepEqual(key.public, keys[0].public);
      assert.ok(holds(key.public, await key.sign(DATA)));
    }
    const pair = indexedDB.stores.get("device").get("key");
    assert.equal(pair.privateKey.extractable, false);
    const counters = await Promise.all(tabs.map((tab) => tab.nextCounter(500n)));
    assert.deepEqual(counters, [500n, 501n, 502n]);
    await tabs[0].raiseCounter(900n);
    assert.equal(await tabs[1].nextCounter(500n), 901n);
  } finally {
    delete globalThis.indexedDB;
  }
});

test("links of both forms, and what is none", () => {
  const ticket = "A".repeat(43);
  const node = Buffer.from(Uint8Array.from({ length: 32 }, (_, at) => at));
  const uid = Buffer.alloc(16, 5);
  const fields = `n=${node.toString("base64url")}&s=${uid.toString("base64url")}`;
  const web = parseLink(`https://host.example:7222/#t=${ticket}&${fields}&m=watch&p=7220&z=future`);
  assert.deepEqual(
    [web.host, web.port, web.sessionPort, web.ticket, web.mode],
    ["host.example", 7222, 7220, ticket, "watch"],
  );
  assert.deepEqual([Buffer.from(web.node), Buffer.from(web.session)], [node, uid]);
  const terminal = parseLink(`sterna://[::1]/?${fields}#t=${ticket}`);
  assert.deepEqual([terminal.host, terminal.port, terminal.sessionPort, terminal.mode], ["::1", 7220, 7220, null]);
  assert.equal(parseLink("wss://h.example/ws").path, "/ws");
  for (const bad of [
    "http://h/",
    "https://user@h/",
    `https://h/?t=${ticket}`,
    `https://h/#t=${ticket.slice(1)}`,
    "https://h/#n=AAAA",
    `https://h/?n=x#n=x`,
    "https://h:0/",
    "https://h:70000/",
    "https://h/#m=other",
    `https://h/#${"a=b&".repeat(40)}`,
    `https://h/#p=12x&t=${ticket}`,
    "x".repeat(3_000),
  ])
    assert.throws(() => parseLink(bad), { codeName: "bad_request" }, bad);
});

test("fingerprints", () => {
  for (const fill of [0, 1, 0x5a, 0xff]) {
    const id = new Uint8Array(32).map((_, at) => (fill + at * 37) & 255);
    const text = fingerprint(id);
    assert.match(text, /^([a-z2-7]{4}-){12}[a-z2-7]{4}$/);
    for (const form of [
      text,
      text.toUpperCase().replaceAll("-", " "),
      Buffer.from(id).toString("hex"),
      Buffer.from(id).toString("base64url"),
    ]) {
      assert.deepEqual(parseNodeId(form), id);
    }
  }
  assert.throws(() => parseNodeId("nonsense"), { codeName: "bad_request" });
});

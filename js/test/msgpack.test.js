import assert from "node:assert/strict";
import test from "node:test";
import { messages, pack, unpack } from "../dist/protocol.js";

const hex = (data) => Buffer.from(data).toString("hex");
const refused = { codeName: "bad_payload" };

test("whole numbers take their shortest form, and come back", () => {
  const forms = [
    [0, "00"],
    [127, "7f"],
    [128, "cc80"],
    [255, "ccff"],
    [256, "cd0100"],
    [65535, "cdffff"],
    [65536, "ce00010000"],
    [2 ** 31 - 1, "ce7fffffff"],
    [2 ** 31, "ce80000000"],
    [2 ** 32 - 1, "ceffffffff"],
    [2 ** 32, "cf0000000100000000"],
    [2 ** 53 - 1, "cf001fffffffffffff"],
    [2n ** 53n, "cf0020000000000000"],
    [2n ** 63n - 1n, "cf7fffffffffffffff"],
    [2n ** 63n, "cf8000000000000000"],
    [-1, "ff"],
    [-32, "e0"],
    [-33, "d0df"],
    [-128, "d080"],
    [-129, "d1ff7f"],
    [-32768, "d18000"],
    [-32769, "d2ffff7fff"],
    [-(2 ** 31), "d280000000"],
    [-(2 ** 31) - 1, "d3ffffffff7fffffff"],
    [-(2n ** 63n), "d38000000000000000"],
  ];
  for (const [value, form] of forms) {
    assert.equal(hex(pack(value)), form, String(value));
    assert.equal(unpack(pack(value)), value);
  }
  assert.equal(unpack(pack(5n)), 5);
  assert.throws(() => pack(2n ** 64n));
});

test("texts, bytes, lists and maps of every length come back", () => {
  for (const size of [0, 1, 15, 16, 31, 32, 255, 256, 15_000]) {
    for (const value of [
      "x".repeat(size),
      "ü€😀".repeat(size),
      new Uint8Array(size).fill(7),
      new Array(size).fill(null),
      Object.fromEntries(Array.from({ length: size }, (_, at) => [`k${at}`, at])),
    ])
      assert.deepEqual(unpack(pack(value), 1 << 20), value);
  }
  assert.deepEqual(unpack(pack({ a: undefined, b: [true, false, null, 1.5] })), { b: [true, false, null, 1.5] });
});

test("what is damaged, too deep or not in use is refused", () => {
  const bad = [
    "",
    "c1",
    "d4007f",
    "c7010501",
    "92",
    "81a161",
    "8101",
    "a2ff",
    "a1ff",
    "dfffffffff",
    "ddffffffff",
    "0000",
    "c6ffffffff00",
    "cf00",
  ];
  for (const one of bad) assert.throws(() => unpack(Buffer.from(one, "hex")), refused, one);
  assert.throws(() => unpack(Buffer.from("91".repeat(40) + "c0", "hex")), refused);
  assert.throws(() => unpack(new Uint8Array(70_000)), refused);
  let deep = null;
  for (let level = 0; level < 40; level++) deep = [deep];
  assert.throws(() => pack(deep));
  const hostile = unpack(pack(JSON.parse('{"__proto__": {"x": 1}}')));
  assert.equal(hostile.x, undefined);
  assert.equal(Object.getPrototypeOf(hostile), Object.prototype);
});

test("random bytes never do anything but give a value or a refusal", () => {
  const seed = Number(process.env.STERNA_SEED ?? Math.floor(Math.random() * 2 ** 31));
  console.log(`STERNA_SEED=${seed}`);
  let state = seed;
  const next = () => (state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff) >> 8;
  for (let round = 0; round < 20_000; round++) {
    const data = Uint8Array.from({ length: next() % 24 }, () => next() & 255);
    try {
      unpack(data);
    } catch (error) {
      assert.equal(error.codeName, "bad_payload");
    }
  }
});

test("messages: defaults, unknown keys, wrong types, positions beyond 2^53", () => {
  const close = messages.parse(messages.Close, pack({ status: 3, future: [1] }));
  assert.deepEqual(close, { code: 0, reason: "", status: 3, signal: null, output: null });
  for (const wrong of [
    { status: "3" },
    { code: null },
    { output: -1 },
    { output: 2n ** 53n },
    { reason: 1.5 },
    [],
    null,
  ]) {
    assert.throws(
      () => messages.parse(messages.Close, pack(wrong)),
      refused,
      JSON.stringify(wrong, (_, v) => String(v)),
    );
  }
  assert.throws(() => messages.parse(messages.Resize, pack({ cols: 80 })), refused);
  const label = messages.parseShown(messages.Event, pack({ kind: "joined", label: "a\x1b[2Jb\u202ec\n" })).label;
  assert.equal(label, "a[2Jbc");
});

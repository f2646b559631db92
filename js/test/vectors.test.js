// Every vector of docs/vectors.json, both directions.

import assert from "node:assert/strict";
import { createPrivateKey, createPublicKey, sign, verify } from "node:crypto";
import { readFileSync } from "node:fs";
import test from "node:test";
import { codeName, crc16, Decoder, decompress, encodeFrame, expand, messages, pack, unpack } from "../dist/protocol.js";

const vectors = JSON.parse(readFileSync(new URL("../../docs/vectors.json", import.meta.url), "utf8"));
const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
const hex = (data) => Buffer.from(data).toString("hex");

/** A vector's message as the client has it: {hex} is bytes, {msgpack} a value, {u64} a bigint. */
function meant(value) {
  if (Array.isArray(value)) return value.map(meant);
  if (value === null || typeof value !== "object") return value;
  const keys = Object.keys(value);
  if (keys.length === 1 && keys[0] === "hex") return bytes(value.hex);
  if (keys.length === 1 && keys[0] === "msgpack") return unpack(bytes(value.msgpack));
  if (keys.length === 1 && keys[0] === "u64") return BigInt(value.u64);
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, meant(item)]));
}

/** Numbers of one width: some fields are bigint even where they are small. */
function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value === "number" && Number.isInteger(value)) return BigInt(value);
  if (value === null || typeof value !== "object" || value instanceof Uint8Array) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]));
}

test("crc", () => {
  assert.ok(vectors.crc.length);
  for (const { data, crc } of vectors.crc) assert.equal(crc16(bytes(data)), Number.parseInt(crc, 16));
});

for (const vector of vectors.frames) {
  test(`frame ${vector.name}`, () => {
    const { type, handle, seq, payload } = vector;
    assert.equal(hex(encodeFrame(type, handle, seq, bytes(payload))), vector.bytes);
    const decoder = new Decoder();
    const [frame, ...others] = decoder.feed(bytes(vector.bytes));
    assert.equal(others.length, 0);
    assert.deepEqual({ ...frame, payload: hex(frame.payload) }, { type, handle, seq, payload });
    const shape = messages.MESSAGES.get(type);
    assert.equal(shape !== undefined, vector.message !== undefined);
    if (shape === undefined) return;
    const message = messages.parse(shape, frame.payload);
    assert.deepEqual(plain(message), plain(meant(vector.message)));
    assert.deepEqual(messages.parse(shape, pack(message)), message, "what we write, we read");
    assert.deepEqual(unpack(pack(unpack(frame.payload))), unpack(frame.payload));
  });
}

function run(vector) {
  const decoder = new Decoder();
  const frames = vector.chunks.flatMap((chunk) => decoder.feed(bytes(chunk)));
  if (vector.fault === "truncated") decoder.eof();
  return { decoder, frames: frames.map((frame) => ({ ...frame, payload: hex(frame.payload) })) };
}

for (const vector of vectors.streams) {
  test(`stream: ${vector.name}`, () => {
    const { decoder, frames } = run(vector);
    decoder.eof();
    assert.deepEqual(frames, vector.frames);
    assert.equal(decoder.fault, null);
  });
}

for (const vector of vectors.faults) {
  test(`fault: ${vector.name}`, () => {
    const { decoder, frames } = run(vector);
    assert.deepEqual(frames, vector.frames);
    assert.equal(decoder.fault, vector.code);
    assert.equal(codeName(decoder.fault), vector.fault);
    assert.deepEqual(decoder.feed(bytes(vectors.frames[2].bytes)), [], "nothing is read after a fault");
  });
}

test("positions", () => {
  assert.ok(vectors.positions.length);
  for (const { low, near, position } of vectors.positions) assert.equal(expand(low, Number(near)), Number(position));
});

const PKCS8 = "302e020100300506032b657004220420";
const SPKI = { ed25519: "302a300506032b6570032100", p256: "3059301306072a8648ce3d020106082a8648ce3d030107034200" };

for (const vector of vectors.signed) {
  test(`signed: ${vector.name}`, async () => {
    const input = bytes(vector.input);
    const spki = bytes(SPKI[vector.algorithm] + vector.public.slice(2));
    const key = createPublicKey({ key: Buffer.from(spki), format: "der", type: "spki" });
    const digest = vector.algorithm === "p256" ? "sha256" : null;
    assert.ok(verify(digest, input, { key, dsaEncoding: "ieee-p1363" }, bytes(vector.signature)));
    if (vector.private !== undefined && vector.algorithm === "ed25519") {
      const secret = createPrivateKey({
        key: Buffer.from(PKCS8 + vector.private, "hex"),
        format: "der",
        type: "pkcs8",
      });
      assert.equal(sign(null, input, secret).toString("hex"), vector.signature);
    }
    const { toSign } = await import("../dist/device.js");
    assert.equal(hex(toSign(vector.context, bytes(vector.node), bytes(vector.body))), vector.input);
    const shape = vector.context.endsWith("CONNECT") ? messages.ConnectBody : messages.ResumeBody;
    const body = messages.parse(shape, bytes(vector.body));
    for (const [name, value] of Object.entries(meant(vector.message)))
      assert.deepEqual(plain(body[name]), plain(value), name);
  });
}

test("zstd", () => {
  assert.ok(vectors.zstd.length);
  for (const { plain: text, compressed } of vectors.zstd) assert.equal(hex(decompress(bytes(compressed))), text);
  assert.throws(() => decompress(bytes(vectors.zstd[0].compressed), 10), { codeName: "too_large" });
});

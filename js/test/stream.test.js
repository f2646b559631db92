import assert from "node:assert/strict";
import test from "node:test";
import { Decoder, encodeFrame, Intake, Race, SendStream, Type, Vitals } from "../dist/protocol.js";

const text = (data) => Buffer.from(data).toString();
const data = (string) => new TextEncoder().encode(string);

for (const edge of [0, 2 ** 31, 2 ** 32, 2 ** 32 + 2 ** 31, 2 ** 33, 2 ** 40, 2 ** 52]) {
  test(`both halves of a stream across position ${edge}`, () => {
    const start = Math.max(edge - 5, 0);
    const sender = new SendStream(start, 64, 3);
    const intake = new Intake(start);
    const decoder = new Decoder();
    let got = "";
    const deliver = () => {
      for (const { type, position, payload } of sender.take()) {
        const [frame] = decoder.feed(encodeFrame(type, 1, position, payload));
        const fresh = intake.receive(frame.seq, frame.payload);
        if (fresh) got += text(fresh);
      }
    };
    assert.equal(sender.write(data("abcdefghij")), 10);
    deliver();
    assert.equal(got, "abcdefghij");
    assert.equal(intake.next, start + 10);
    sender.acknowledge(start + 4);
    sender.rewind(start + 7);
    assert.equal(sender.write(data("klm")), 3);
    deliver();
    assert.equal(got, "abcdefghijklm", "what was had before is dropped");
    sender.rewind(start + 13);
    assert.deepEqual(sender.take(), []);
    assert.throws(() => sender.rewind(start + 12), { codeName: "gap" });
    assert.throws(() => sender.acknowledge(start + 14), { codeName: "protocol" });
    assert.throws(() => intake.receive((start + 14) % 2 ** 32, data("x")), { codeName: "gap" });
    assert.equal(intake.receive((start + 12) % 2 ** 32, data("mn")).length, 1);
  });
}

test("the window bounds what is kept, a mark takes one position", () => {
  const sender = new SendStream(0, 10, 4);
  assert.equal(sender.write(data("0123456789abc")), 10);
  assert.equal(sender.mark(Type.EOF), false);
  assert.deepEqual(
    sender.take().map((item) => text(item.payload)),
    ["0123", "4567", "89"],
  );
  assert.equal(sender.acknowledge(6), 6);
  assert.equal(sender.acknowledge(3), 0);
  assert.equal(sender.room, 6);
  assert.ok(sender.mark(Type.EOF));
  sender.rewind(7);
  assert.deepEqual(
    sender.take().map((item) => [item.type, item.position, text(item.payload)]),
    [
      [Type.DATA, 7, "7"],
      [Type.DATA, 8, "89"],
      [Type.EOF, 10, ""],
    ],
  );
  assert.equal(sender.end, 11);
});

test("what an earlier connection carried may be acknowledged before it is sent again", () => {
  const sender = new SendStream(0, 100, 5);
  sender.write(data("0123456789"));
  sender.take();
  sender.rewind(2);
  assert.equal(sender.acknowledge(7), 5);
  assert.deepEqual(
    sender.take().map((item) => [item.position, text(item.payload)]),
    [[7, "789"]],
  );
});

test("acknowledgements are lazy", () => {
  const intake = new Intake();
  intake.receive(0, new Uint8Array(1_000));
  assert.equal(intake.timeout(), null, "what is not handled is not acknowledged");
  intake.handle(500, 1_000);
  assert.equal(intake.acknowledgement(1_099, true), null);
  assert.equal(intake.acknowledgement(1_249, false), null);
  assert.equal(intake.timeout(), 1_250);
  assert.equal(intake.acknowledgement(1_100, true), 500);
  intake.handle(1_000, 2_000);
  assert.equal(intake.acknowledgement(2_250, false), 1_000);
  intake.receive(1_000, new Uint8Array(65_535));
  intake.receive(66_535, new Uint8Array(10));
  intake.handle(66_536, 3_000);
  assert.equal(intake.acknowledgement(3_000, false), 66_536, "64 KiB at once");
});

test("frames of any split are the same", () => {
  const frames = [0, 1, 14, 15, 16, 300, 65_535].map((size, at) => [
    Type.DATA,
    at + 1,
    at,
    new Uint8Array(size).fill(at),
  ]);
  const all = Buffer.concat(frames.map((frame) => encodeFrame(...frame)));
  for (const step of [1, 2, 7, 15, 16, 1_000, 65_549, all.length]) {
    const decoder = new Decoder();
    const got = [];
    for (let at = 0; at < all.length; at += step) got.push(...decoder.feed(all.subarray(at, at + step)));
    assert.deepEqual(
      got.map((frame) => [frame.type, frame.handle, frame.seq, frame.payload]),
      frames,
    );
    assert.equal(decoder.waiting, 0);
  }
});

test("a payload does not share the memory that was read into", () => {
  const read = Buffer.from(encodeFrame(Type.DATA, 1, 0, data("kept")));
  const [frame] = new Decoder().feed(read);
  read.fill(0);
  assert.equal(text(frame.payload), "kept");
});

test("silence is looked into after traffic, and rarely without", () => {
  const vitals = new Vitals(0);
  assert.equal(vitals.due(false), 1_000);
  assert.equal(vitals.check(1_000, false), "ping");
  vitals.received(1_050);
  vitals.answered(1_000, 1_050);
  assert.equal(vitals.srtt, 50);
  vitals.received(20_000);
  assert.equal(vitals.due(false), 35_000);
  assert.equal(vitals.due(true), 21_000, "input that is not acknowledged");
  assert.equal(vitals.check(35_000, false), "ping");
  assert.equal(vitals.check(35_199, false), "");
  assert.equal(vitals.check(35_200, false), "no answer");
});

test("refused connections are backed off with full jitter, up to 2 s, soon at first", () => {
  for (const share of [0, 0.5, 0.999]) {
    const race = new Race(() => share);
    race.begin(0);
    let now = 0;
    const pauses = [];
    for (let turn = 0; turn < 12; turn++) {
      assert.ok(race.take(now));
      race.failed(now, true);
      pauses.push(race.due() - now);
      now = race.due();
    }
    assert.equal(pauses[0], share * 100);
    assert.ok(Math.abs(Math.max(...pauses) - share * 2_000) < 0.01);
  }
});

test("where nothing tells how far a connection got, the pauses grow", () => {
  const race = new Race(() => 0.5, 500, true);
  race.begin(0);
  const times = [];
  for (let now = 0; times.length < 6; now = race.due()) {
    assert.ok(race.take(now));
    times.push(now);
  }
  assert.deepEqual(times, [0, 500, 1_500, 3_500, 7_500, 11_500]);
  race.hurry(12_000);
  assert.ok(race.take(12_000));
  assert.equal(race.due(), 12_500);
});

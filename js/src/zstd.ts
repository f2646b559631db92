/**
 * Decompresses one zstd frame (RFC 8878), for snapshots: neither browsers nor Node.js 20 can.
 *
 * No dictionaries; a checksum, which snapshots do not carry, is skipped. Every length is checked before it is used.
 */

import { Code, ProtocolError } from "./errors.js";
import { DECOMPRESSED_MAX_BYTES } from "./limits.js";

const MAGIC = 0xfd2fb528;
const BLOCK_MAX_BYTES = 128 * 1024;
const HUFFMAN_BITS_MAX = 11;

/** Returns what one zstd frame holds; throws ProtocolError: `too_large` beyond `limit`, `bad_payload` if it is none. */
export function decompress(data: Uint8Array, limit = DECOMPRESSED_MAX_BYTES): Uint8Array<ArrayBuffer> {
  const source = new Source(data);
  if (source.little(4) !== MAGIC) throw damaged();
  const flags = source.byte();
  const single = (flags & 0x20) !== 0;
  if (flags & 0x08) throw damaged();
  if (!single) source.byte(); // the window's size: all of the output is at hand, whatever it is
  const dictionary = source.little([0, 1, 2, 4][flags & 3]);
  if (dictionary !== 0) throw damaged();
  const sizeBytes = [single ? 1 : 0, 2, 4, 8][flags >> 6];
  const told = sizeBytes ? source.little(sizeBytes) + (sizeBytes === 2 ? 256 : 0) : null;
  if (told !== null && told > limit) throw tooLarge(limit);
  const frame = new Frame(new Output(told ?? Math.min(limit, data.length * 4 + 1024), limit));
  for (let last = false; !last; ) {
    const head = source.little(3);
    last = (head & 1) !== 0;
    const size = head >> 3;
    if (size > BLOCK_MAX_BYTES) throw damaged();
    const type = (head >> 1) & 3;
    if (type === 0) frame.output.append(source.take(size));
    else if (type === 1) frame.output.fill(source.byte(), size);
    else if (type === 2) frame.block(source.take(size));
    else throw damaged();
  }
  if (flags & 0x04) source.take(4);
  if (source.at !== data.length || (told !== null && told !== frame.output.size)) throw damaged();
  return frame.output.bytes();
}

function damaged(): ProtocolError {
  return new ProtocolError(Code.BAD_PAYLOAD, "a compressed payload is damaged");
}

function tooLarge(limit: number): ProtocolError {
  return new ProtocolError(Code.TOO_LARGE, `a payload of more than ${limit} bytes was refused`);
}

function log2(value: number): number {
  return 31 - Math.clz32(value);
}

/** Bytes read from the front. */
class Source {
  at = 0;

  constructor(readonly data: Uint8Array) {}

  get left(): number {
    return this.data.length - this.at;
  }

  byte(): number {
    return this.take(1)[0];
  }

  take(count: number): Uint8Array {
    if (count > this.left) throw damaged();
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  little(count: number): number {
    return this.take(count).reduceRight((value, byte) => value * 256 + byte, 0);
  }
}

/** What comes out; grows up to the limit. */
class Output {
  size = 0;
  private buffer: Uint8Array<ArrayBuffer>;

  constructor(
    expected: number,
    private readonly limit: number,
  ) {
    this.buffer = new Uint8Array(expected);
  }

  private reserve(count: number): void {
    const need = this.size + count;
    if (need > this.limit) throw tooLarge(this.limit);
    if (need <= this.buffer.length) return;
    const larger = new Uint8Array(Math.min(this.limit, Math.max(need, this.buffer.length * 2)));
    larger.set(this.buffer.subarray(0, this.size));
    this.buffer = larger;
  }

  append(data: Uint8Array): void {
    this.reserve(data.length);
    this.buffer.set(data, this.size);
    this.size += data.length;
  }

  fill(byte: number, count: number): void {
    this.reserve(count);
    this.buffer.fill(byte, this.size, this.size + count);
    this.size += count;
  }

  /** Repeats `count` bytes from `offset` bytes ago; they may overlap what is written. */
  copy(offset: number, count: number): void {
    if (offset < 1 || offset > this.size) throw damaged();
    this.reserve(count);
    const { buffer } = this;
    const from = this.size - offset;
    if (offset >= count) buffer.copyWithin(this.size, from, from + count);
    else for (let at = 0; at < count; at++) buffer[this.size + at] = buffer[from + at];
    this.size += count;
  }

  bytes(): Uint8Array<ArrayBuffer> {
    return this.buffer.length === this.size ? this.buffer : this.buffer.slice(0, this.size);
  }
}

/** Bits read from the end to the front; `position` is how many are left, negative after reading too many (zeros). */
class Backward {
  position: number;

  constructor(private readonly data: Uint8Array) {
    const last = data[data.length - 1];
    if (!last) throw damaged();
    this.position = (data.length - 1) * 8 + log2(last);
  }

  /** Returns the next `count` bits, at most 24, without taking them. */
  peek(count: number): number {
    const start = this.position - count;
    if (start >= 0) return this.word(start) & ((1 << count) - 1);
    return this.position <= 0 ? 0 : (this.word(0) & ((1 << this.position) - 1)) << -start;
  }

  /** Takes the next bits, at most 32. */
  read(count: number): number {
    if (count > 16) return this.read(count - 16) * 0x1_0000 + this.read(16);
    const value = this.peek(count);
    this.position -= count;
    return value;
  }

  private word(bit: number): number {
    const at = bit >> 3;
    const { data } = this;
    return (
      ((data[at] ?? 0) | ((data[at + 1] ?? 0) << 8) | ((data[at + 2] ?? 0) << 16) | ((data[at + 3] ?? 0) << 24)) >>>
      (bit & 7)
    );
  }
}

/** A table of a finite state entropy decoder: for each state its symbol, and how the next one is found. */
class StateTable {
  readonly symbols: Uint8Array;
  readonly counts: Uint8Array;
  readonly bases: Uint16Array;

  constructor(
    readonly bits: number,
    shares: readonly number[],
  ) {
    const size = 1 << bits;
    this.symbols = new Uint8Array(size);
    this.counts = new Uint8Array(size);
    this.bases = new Uint16Array(size);
    const next = shares.map((share) => Math.abs(share));
    let high = size;
    shares.forEach((share, symbol) => {
      if (share === -1) this.symbols[--high] = symbol;
    });
    const step = (size >> 1) + (size >> 3) + 3;
    let at = 0;
    shares.forEach((share, symbol) => {
      for (let left = share; left > 0; left--) {
        this.symbols[at] = symbol;
        do at = (at + step) & (size - 1);
        while (at >= high);
      }
    });
    if (at !== 0) throw damaged();
    for (let state = 0; state < size; state++) {
      const value = next[this.symbols[state]]++;
      this.counts[state] = bits - log2(value);
      this.bases[state] = (value << this.counts[state]) - size;
    }
  }

  /** The table that always says the same, without any bits. */
  static constant(symbol: number): StateTable {
    const table = new StateTable(0, [1]);
    table.symbols[0] = symbol;
    return table;
  }

  /** Reads a table's description. */
  static read(source: Source, maxBits: number, maxSymbol: number): StateTable {
    const start = source.at;
    let bit = 0;
    const take = (count: number): number => {
      let value = 0;
      for (let at = 0; at < count; at++, bit++) {
        const byte = source.data[start + (bit >> 3)];
        if (byte === undefined) throw damaged();
        value |= ((byte >> (bit & 7)) & 1) << at;
      }
      return value;
    };
    const bits = take(4) + 5;
    if (bits > maxBits) throw damaged();
    const shares: number[] = [];
    let left = 1 << bits;
    while (left > 0 && shares.length <= maxSymbol) {
      const count = log2(left + 1) + 1;
      const low = (1 << (count - 1)) - 1;
      const threshold = (1 << count) - 2 - left;
      let value = take(count - 1);
      if (value >= threshold) {
        value |= take(1) << (count - 1);
        if (value > low) value -= threshold;
      }
      const share = value - 1;
      left -= Math.abs(share);
      shares.push(share);
      for (let zeros = share === 0 ? 3 : 0; zeros === 3; ) {
        zeros = take(2);
        for (let at = 0; at < zeros; at++) shares.push(0);
      }
    }
    if (left !== 0 || shares.length > maxSymbol + 1) throw damaged();
    source.take((bit + 7) >> 3);
    return new StateTable(bits, shares);
  }
}

/** A Huffman code as a table over the next `bits` bits. */
class Huffman {
  readonly symbols: Uint8Array;
  readonly lengths: Uint8Array;
  readonly bits: number;

  constructor(weights: number[]) {
    const total = weights.reduce((sum, weight) => sum + (weight ? 1 << (weight - 1) : 0), 0);
    if (total === 0) throw damaged();
    this.bits = log2(total) + 1;
    const rest = (1 << this.bits) - total;
    // The last weight is not written: it fills the code up, so what is missing must be a power of two.
    if (this.bits > HUFFMAN_BITS_MAX || rest & (rest - 1) || weights.length > 255) throw damaged();
    weights.push(log2(rest) + 1);
    this.symbols = new Uint8Array(1 << this.bits);
    this.lengths = new Uint8Array(1 << this.bits);
    let at = 0;
    for (let weight = 1; weight <= this.bits; weight++) {
      weights.forEach((each, symbol) => {
        if (each !== weight) return;
        const end = at + (1 << (weight - 1));
        this.symbols.fill(symbol, at, end);
        this.lengths.fill(this.bits + 1 - weight, at, end);
        at = end;
      });
    }
  }

  static read(source: Source): Huffman {
    const head = source.byte();
    if (head < 128) return new Huffman(Huffman.weights(new Source(source.take(head))));
    const packed = source.take((head - 126) >> 1);
    return new Huffman(
      Array.from({ length: head - 127 }, (_, at) => (at & 1 ? packed[at >> 1] & 15 : packed[at >> 1] >> 4)),
    );
  }

  /** Weights behind two states that take turns, until the bits are used up. */
  private static weights(source: Source): number[] {
    const table = StateTable.read(source, 6, 255);
    const bits = new Backward(source.take(source.left));
    const states = [bits.read(table.bits), bits.read(table.bits)];
    const weights: number[] = [];
    for (let turn = 0; ; turn ^= 1) {
      const state = states[turn];
      weights.push(table.symbols[state]);
      states[turn] = table.bases[state] + bits.read(table.counts[state]);
      if (bits.position < 0) {
        weights.push(table.symbols[states[turn ^ 1]]);
        break;
      }
      if (weights.length > 255) throw damaged();
    }
    if (weights.some((weight) => weight > HUFFMAN_BITS_MAX)) throw damaged();
    return weights;
  }

  decode(data: Uint8Array, out: Uint8Array): void {
    if (!data.length) throw damaged();
    const bits = new Backward(data);
    for (let at = 0; at < out.length; at++) {
      const index = bits.peek(this.bits);
      out[at] = this.symbols[index];
      bits.position -= this.lengths[index];
    }
    if (bits.position !== 0) throw damaged();
  }
}

interface Kind {
  maxBits: number;
  maxSymbol: number;
  usual: StateTable;
}

function ramp(start: number, counts: readonly number[]): { bases: number[]; bits: number[] } {
  const bases: number[] = [];
  let base = start;
  for (const count of counts) {
    bases.push(base);
    base += 2 ** count;
  }
  return { bases, bits: [...counts] };
}

const LITERALS: Kind = {
  maxBits: 9,
  maxSymbol: 35,
  usual: new StateTable(
    6,
    [4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1],
  ),
};
const OFFSETS: Kind = {
  maxBits: 8,
  maxSymbol: 31,
  usual: new StateTable(
    5,
    [1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1],
  ),
};
const MATCHES: Kind = {
  maxBits: 9,
  maxSymbol: 52,
  usual: new StateTable(6, [1, 4, 3, 2, 2, 2, 2, 2, 2, ...new Array<number>(37).fill(1), -1, -1, -1, -1, -1, -1, -1]),
};
const LITERAL_LENGTHS = ramp(0, [
  ...new Array<number>(16).fill(0),
  1,
  1,
  1,
  1,
  2,
  2,
  3,
  3,
  4,
  6,
  7,
  8,
  9,
  10,
  11,
  12,
  13,
  14,
  15,
  16,
]);
const MATCH_LENGTHS = ramp(3, [
  ...new Array<number>(32).fill(0),
  1,
  1,
  1,
  1,
  2,
  2,
  3,
  3,
  4,
  4,
  5,
  7,
  8,
  9,
  10,
  11,
  12,
  13,
  14,
  15,
  16,
]);

/** What blocks of one frame have in common: the output, the tables of the last block, the last three offsets. */
class Frame {
  private huffman: Huffman | null = null;
  private readonly tables: (StateTable | null)[] = [null, null, null];
  private readonly recent = [1, 4, 8];

  constructor(readonly output: Output) {}

  /** Decompresses one block. */
  block(data: Uint8Array): void {
    const source = new Source(data);
    const literals = this.literals(source);
    const first = source.byte();
    let count = first;
    if (first >= 128) count = first < 255 ? ((first - 128) << 8) + source.byte() : source.little(2) + 0x7f00;
    if (count === 0) {
      if (source.left) throw damaged();
      this.output.append(literals);
      return;
    }
    const modes = source.byte();
    if (modes & 3) throw damaged();
    const [lengths, offsets, matches] = [LITERALS, OFFSETS, MATCHES].map((kind, at) =>
      this.table(source, kind, at, (modes >> (6 - at * 2)) & 3),
    );
    if (!source.left) throw damaged();
    this.sequences(new Backward(source.take(source.left)), count, literals, lengths, offsets, matches);
  }

  private table(source: Source, kind: Kind, at: number, mode: number): StateTable {
    let table = this.tables[at];
    if (mode === 0) table = kind.usual;
    else if (mode === 1) {
      const symbol = source.byte();
      if (symbol > kind.maxSymbol) throw damaged();
      table = StateTable.constant(symbol);
    } else if (mode === 2) table = StateTable.read(source, kind.maxBits, kind.maxSymbol);
    if (table === null) throw damaged();
    this.tables[at] = table;
    return table;
  }

  private literals(source: Source): Uint8Array {
    const first = source.byte();
    const type = first & 3;
    const format = (first >> 2) & 3;
    if (type < 2) {
      const size = format & 1 ? (first >> 4) + source.little(format === 1 ? 1 : 2) * 16 : first >> 3;
      if (size > BLOCK_MAX_BYTES) throw damaged();
      return type === 0 ? source.take(size) : new Uint8Array(size).fill(source.byte());
    }
    const width = [10, 10, 14, 18][format];
    const head = Math.floor((first + source.little([2, 2, 3, 4][format]) * 256) / 16);
    const size = head % 2 ** width;
    const inner = new Source(source.take(Math.floor(head / 2 ** width)));
    if (size > BLOCK_MAX_BYTES) throw damaged();
    if (type === 2) this.huffman = Huffman.read(inner);
    if (this.huffman === null) throw damaged();
    const out = new Uint8Array(size);
    if (format === 0) this.huffman.decode(inner.take(inner.left), out);
    else {
      const sizes = [inner.little(2), inner.little(2), inner.little(2)];
      const part = (size + 3) >> 2;
      if (part * 3 > size) throw damaged();
      for (let at = 0; at < 4; at++) {
        const piece = inner.take(at < 3 ? sizes[at] : inner.left);
        this.huffman.decode(piece, out.subarray(at * part, at < 3 ? (at + 1) * part : size));
      }
    }
    return out;
  }

  private sequences(
    bits: Backward,
    count: number,
    literals: Uint8Array,
    lengths: StateTable,
    offsets: StateTable,
    matches: StateTable,
  ): void {
    let length = bits.read(lengths.bits);
    let offset = bits.read(offsets.bits);
    let match = bits.read(matches.bits);
    let used = 0;
    for (let left = count; left > 0; left--) {
      const code = offsets.symbols[offset];
      const distance = 2 ** code + bits.read(code);
      const matchCode = matches.symbols[match];
      const copied = MATCH_LENGTHS.bases[matchCode] + bits.read(MATCH_LENGTHS.bits[matchCode]);
      const lengthCode = lengths.symbols[length];
      const literal = LITERAL_LENGTHS.bases[lengthCode] + bits.read(LITERAL_LENGTHS.bits[lengthCode]);
      if (used + literal > literals.length || bits.position < 0) throw damaged();
      this.output.append(literals.subarray(used, used + literal));
      used += literal;
      this.output.copy(this.distance(distance, literal === 0), copied);
      if (left > 1) {
        length = lengths.bases[length] + bits.read(lengths.counts[length]);
        match = matches.bases[match] + bits.read(matches.counts[match]);
        offset = offsets.bases[offset] + bits.read(offsets.counts[offset]);
      }
    }
    if (bits.position !== 0) throw damaged();
    this.output.append(literals.subarray(used));
  }

  /** Returns how far back a match lies: a distance of its own, or one of the last three. */
  private distance(value: number, afterMatch: boolean): number {
    const { recent } = this;
    if (value > 3) {
      recent.unshift(value - 3);
      recent.pop();
      return value - 3;
    }
    const index = value - 1 + (afterMatch ? 1 : 0);
    const found = index === 3 ? recent[0] - 1 : recent[index];
    if (index > 0) {
      recent.splice(Math.min(index, 2), 1);
      recent.unshift(found);
    }
    return found;
  }
}

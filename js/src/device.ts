/** The device key: what proves that we are the installation that opened a session (docs/protocol.md, section 4). */

import { type Bytes, concat } from "./bytes.js";
import { Code, SternaError, TrustError } from "./errors.js";
import { POSITION_MAX } from "./limits.js";

export const ED25519 = 1;
export const P256 = 2;
/** What a node may make us jump to leaves room for 2^40 more connections below the largest number on the wire. */
const COUNTER_RAISE_MAX = POSITION_MAX - (1n << 40n);

/** A private key that signs for this installation; `public` is its wire form: an algorithm byte and the raw key. */
export interface DeviceKey {
  readonly public: Bytes;
  /** Returns the 64-byte signature over these bytes. */
  sign(data: Bytes): Promise<Bytes>;
}

/** Where an installation keeps its key and the counter of its RESUMEs. */
export interface DeviceStorage {
  /** Returns the installation's key, made on first use. */
  loadKey(): Promise<DeviceKey>;
  /** Returns max(stored + 1, `wallNs`) and stores it. */
  nextCounter(wallNs: bigint): Promise<bigint>;
  /** Makes the next counter larger than `atLeast`. */
  raiseCounter(atLeast: bigint): Promise<void>;
}

/** Throws TrustError for a counter that no device can have reached. */
export function checkCounter(atLeast: bigint): void {
  if (atLeast < 0n || atLeast > COUNTER_RAISE_MAX) {
    throw new TrustError("The node claims a counter that no device can have reached: it is broken or hostile.");
  }
}

/** Returns the next counter after `stored` (0 where nothing is): never one twice, never below the wall clock. */
export function counterAfter(stored: bigint, wallNs: bigint): bigint {
  const value = stored >= wallNs ? stored + 1n : wallNs;
  if (value > POSITION_MAX)
    throw new TrustError("This device's counter is used up: remove its storage to get a new identity.");
  return value;
}

/** Returns the wall clock in nanoseconds. */
export function wallNs(): bigint {
  return BigInt(Math.round(Date.now() * 1_000)) * 1_000n;
}

/** Returns what is signed: context (ASCII), node id (32 bytes) and body. */
export function toSign(context: string, node: Uint8Array, body: Uint8Array): Bytes {
  return concat([new TextEncoder().encode(context), node, body]);
}

/** Returns WebCrypto, which browsers have on secure pages only. */
export function subtle(): SubtleCrypto {
  const found = globalThis.crypto?.subtle;
  if (found === undefined) {
    throw new SternaError(Code.UNSUPPORTED, "This page cannot make keys: open it by https:// (or on localhost).");
  }
  return found;
}

/** Returns a new key pair that WebCrypto does not give away: Ed25519, else P-256 where that is missing. */
export async function generatePair(): Promise<CryptoKeyPair> {
  try {
    return (await subtle().generateKey("Ed25519", false, ["sign", "verify"])) as CryptoKeyPair;
  } catch (error) {
    if (error instanceof SternaError) throw error;
    return subtle().generateKey({ name: "ECDSA", namedCurve: "P-256" }, false, ["sign", "verify"]);
  }
}

/** A key pair of WebCrypto as a device key; its private half may be one that cannot be exported. */
export class WebKey implements DeviceKey {
  readonly public: Bytes;
  private readonly privateKey: CryptoKey;

  private constructor(wire: Bytes, privateKey: CryptoKey) {
    this.public = wire;
    this.privateKey = privateKey;
  }

  static async of(pair: CryptoKeyPair): Promise<WebKey> {
    const raw = new Uint8Array(await subtle().exportKey("raw", pair.publicKey));
    const algorithm = pair.privateKey.algorithm.name === "Ed25519" ? ED25519 : P256;
    return new WebKey(concat([Uint8Array.of(algorithm), raw]), pair.privateKey);
  }

  async sign(data: Bytes): Promise<Bytes> {
    const how = this.public[0] === ED25519 ? "Ed25519" : { name: "ECDSA", hash: "SHA-256" };
    return new Uint8Array(await subtle().sign(how, this.privateKey, data));
  }
}

/** Keeps key and counter in memory: a new identity each time, for tests and for who must leave no trace. */
export class MemoryStorage implements DeviceStorage {
  private key: Promise<DeviceKey> | null = null;
  private counter = 0n;

  loadKey(): Promise<DeviceKey> {
    this.key ??= generatePair().then((pair) => WebKey.of(pair));
    return this.key;
  }

  async nextCounter(now: bigint): Promise<bigint> {
    this.counter = counterAfter(this.counter, now);
    return this.counter;
  }

  async raiseCounter(atLeast: bigint): Promise<void> {
    checkCounter(atLeast);
    if (atLeast > this.counter) this.counter = atLeast;
  }
}

/** Node.js: TLS 1.3 over TCP to a node that is pinned, key and pins in files of a directory that the caller names. */

import { createHash, createPrivateKey, createPublicKey, type KeyObject, sign, X509Certificate } from "node:crypto";
import { chmod, link, mkdir, open, rename, stat, unlink, writeFile } from "node:fs/promises";
import { hostname, userInfo } from "node:os";
import { join } from "node:path";
import { connect, type ConnectionOptions, type PeerCertificate, type TLSSocket } from "node:tls";
import { type Bytes, concat, equal, fromBase64Url, fromHex, toBase64Url, toHex } from "./bytes.js";
import { checkCounter, counterAfter, type DeviceKey, type DeviceStorage, ED25519 } from "./device.js";
import { Code, ConnectionLostError, SternaError, TrustError, UsageError } from "./errors.js";
import { fingerprint, joined } from "./links.js";
import { HANDSHAKE_MS, RACE_EVERY_MS, RACE_OPEN_MAX } from "./limits.js";
import { type Hears, type Place, type Platform, random, type Target, type Wire } from "./platform.js";
import { webSocketTarget } from "./websocket.js";

const ALPN = "clawterm/1";
const KEY_FILE = "device.key";
const COUNTER_FILE = "device.counter";
const PINS_FILE = "known_nodes";
const KEY_PREFIX = "ed25519 ";
/** PKCS #8 before an Ed25519 seed (RFC 8410). */
const PKCS8_HEAD = fromHex("302e020100300506032b657004220420")!;
const CHAIN_MAX = 10;
const CERTIFICATE_MAX_BYTES = 16_384;

/** A node as it is known: its id and its own certificate (DER), to which those of its connections chain. */
interface Pin {
  node: Bytes;
  ca: Bytes;
}

/** Key, counter and pins in a directory of mode 0700, in the files and forms of Sterna's other clients. */
export class DirectoryStorage implements DeviceStorage {
  private key: Promise<DeviceKey> | null = null;
  private turn: Promise<unknown> = Promise.resolve();

  constructor(readonly directory: string) {}

  loadKey(): Promise<DeviceKey> {
    this.key ??= this.readKey();
    return this.key;
  }

  private async readKey(): Promise<DeviceKey> {
    const path = join(this.directory, KEY_FILE);
    await this.prepare();
    if ((await readPrivate(path)) === null) {
      // Of several processes that make a key, the first one's stays: link(2) never replaces.
      const draft = `${path}.${process.pid}.${toHex(random(4))}`;
      await writeFile(draft, `${KEY_PREFIX}${toHex(random(32))}\n`, { mode: 0o600, flag: "wx", flush: true });
      await link(draft, path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== "EEXIST") throw storage(path, error);
      });
      await unlink(draft);
    }
    const text = (await readPrivate(path)) ?? "";
    const seed = text.startsWith(KEY_PREFIX) ? fromHex(text.slice(KEY_PREFIX.length).trim()) : null;
    if (seed?.length !== 32) {
      throw new TrustError(`The key in ${path} is damaged: restore it, or remove the file to get a new identity.`);
    }
    return new FileKey(seed);
  }

  nextCounter(wallNs: bigint): Promise<bigint> {
    return this.alone(async () => {
      const value = counterAfter(await this.stored(), wallNs);
      await this.replace(COUNTER_FILE, `${value}\n`).catch((error: unknown) => {
        // On a full disk the wall clock has to do: nobody is kept from a session that could make room.
        if (value !== wallNs) throw error;
      });
      return value;
    });
  }

  raiseCounter(atLeast: bigint): Promise<void> {
    checkCounter(atLeast);
    return this.alone(async () => {
      if (atLeast > (await this.stored())) await this.replace(COUNTER_FILE, `${atLeast}\n`);
    });
  }

  private async stored(): Promise<bigint> {
    const text = ((await readPrivate(join(this.directory, COUNTER_FILE))) ?? "").trim();
    return /^[0-9]{1,19}$/.test(text) ? BigInt(text) : 0n;
  }

  /** Returns what is known of the node at an address, or null; throws TrustError if the line is damaged. */
  async pin(address: string): Promise<Pin | null> {
    const path = join(this.directory, PINS_FILE);
    const line = ((await readPrivate(path)) ?? "").split("\n").find((each) => each.startsWith(`${address} `));
    if (line === undefined) return null;
    const ca = fromBase64Url(line.split(" ")[2] ?? "");
    const node = ca === null || !ca.length ? null : nodeIdOf(ca);
    if (ca === null || node === null || fingerprint(node) !== line.split(" ")[1]) {
      // To take it for an unknown node would mean to trust whoever answers.
      throw new TrustError(`The line ${address} in ${path} is damaged: remove it to trust the node anew.`);
    }
    return { node, ca };
  }

  /** Remembers a node, in place of what was known at that address. */
  putPin(address: string, pin: Pin): Promise<void> {
    return this.alone(async () => {
      const lines = ((await readPrivate(join(this.directory, PINS_FILE))) ?? "").split("\n");
      const kept = lines.filter((line) => line && !line.startsWith(`${address} `)).slice(-4_095);
      kept.push(`${address} ${fingerprint(pin.node)} ${toBase64Url(pin.ca)}`);
      await this.replace(PINS_FILE, `${kept.join("\n")}\n`);
    });
  }

  private async prepare(): Promise<void> {
    try {
      if ((await mkdir(this.directory, { recursive: true, mode: 0o700 })) !== undefined)
        await chmod(this.directory, 0o700);
    } catch (error) {
      throw storage(this.directory, error);
    }
    const { mode } = await stat(this.directory);
    if (mode & 0o077) throw new TrustError(`The directory ${this.directory} is open to others: chmod 700 it.`);
  }

  private async replace(name: string, content: string): Promise<void> {
    await this.prepare();
    const path = join(this.directory, name);
    const draft = `${path}.${process.pid}.${toHex(random(4))}`;
    try {
      await writeFile(draft, content, { mode: 0o600, flag: "wx" });
      await rename(draft, path);
    } catch (error) {
      await unlink(draft).catch(() => undefined);
      throw storage(path, error);
    }
  }

  /** Does one thing after another: nobody else of this process changes what is read before it is written. */
  private alone<T>(what: () => Promise<T>): Promise<T> {
    const done = this.turn.then(what, what);
    this.turn = done.catch(() => undefined);
    return done;
  }
}

async function readPrivate(path: string): Promise<string | null> {
  const file = await open(path, "r").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return null;
    throw storage(path, error);
  });
  if (file === null) return null;
  try {
    if ((await file.stat()).mode & 0o077) throw new TrustError(`The file ${path} is open to others: chmod 600 it.`);
    return await file.readFile("ascii");
  } finally {
    await file.close();
  }
}

function storage(path: string, error: unknown): SternaError {
  return new SternaError(Code.STORAGE, `${path} cannot be used: ${(error as Error).message}.`);
}

class FileKey implements DeviceKey {
  readonly public: Bytes;
  private readonly key: KeyObject;

  constructor(seed: Bytes) {
    this.key = createPrivateKey({ key: Buffer.from(concat([PKCS8_HEAD, seed])), format: "der", type: "pkcs8" });
    const spki = createPublicKey(this.key).export({ format: "der", type: "spki" });
    this.public = concat([Uint8Array.of(ED25519), spki.subarray(-32)]);
  }

  async sign(data: Bytes): Promise<Bytes> {
    return new Uint8Array(sign(null, data, this.key));
  }
}

/** Returns SHA-256 of the public key (SubjectPublicKeyInfo) of a certificate, null if it is none. */
function nodeIdOf(certificate: Uint8Array): Bytes | null {
  try {
    const { publicKey } = new X509Certificate(certificate);
    return new Uint8Array(
      createHash("sha256")
        .update(publicKey.export({ format: "der", type: "spki" }))
        .digest(),
    );
  } catch {
    return null;
  }
}

/** Returns the node's own certificate among those shown: named after its own id, or having the `expected` one. */
function peerOf(socket: TLSSocket, expected: Bytes | null): Pin {
  let certificate: PeerCertificate | undefined = socket.getPeerCertificate(true);
  const seen = new Set<string>();
  let found: Pin | null = null;
  for (let count = 0; certificate?.raw !== undefined && count < CHAIN_MAX; count++) {
    const ca = new Uint8Array(certificate.raw);
    const node = ca.length <= CERTIFICATE_MAX_BYTES && !seen.has(toHex(ca)) ? nodeIdOf(ca) : null;
    if (node === null) break;
    seen.add(toHex(ca));
    const named = certificate.subject?.CN === `Sterna node ${toHex(node).slice(0, 16)}`;
    if (named || (expected !== null && equal(node, expected))) found = { node, ca };
    certificate = "issuerCertificate" in certificate ? (certificate.issuerCertificate as PeerCertificate) : undefined;
  }
  if (found !== null) return found;
  throw new TrustError(
    "The other side does not show a certificate of a Sterna node: check host and port, and that no proxy ends TLS.",
  );
}

function options(place: Place, pin: Pin | null): ConnectionOptions {
  return {
    host: place.host,
    port: place.port,
    minVersion: "TLSv1.3",
    maxVersion: "TLSv1.3",
    ALPNProtocols: [ALPN],
    // Names are not checked: the certificate is the identity, and a node may be reached under any name or address.
    checkServerIdentity: () => undefined,
    // Said in so many words: the environment may not change it.
    ...(pin === null ? { rejectUnauthorized: false } : { rejectUnauthorized: true, ca: pem(pin.ca) }),
  };
}

function pem(der: Uint8Array): string {
  return `-----BEGIN CERTIFICATE-----\n${Buffer.from(der).toString("base64")}\n-----END CERTIFICATE-----\n`;
}

function untrusted(error: NodeJS.ErrnoException): boolean {
  return /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO|CERT_|INVALID_CA|ERR_TLS_CERT)/.test(error.code ?? "");
}

/** Returns the error for a node that could not be reached, or is another one. */
function dialError(name: string, error: NodeJS.ErrnoException): SternaError {
  if (untrusted(error))
    return new TrustError(`The node at ${name} is not the one known there: its certificate is another's.`);
  if (error.code?.startsWith("ERR_SSL")) {
    return new ConnectionLostError(`What listens at ${name} does not answer as a Sterna node: check host and port.`);
  }
  return new ConnectionLostError(`The node at ${name} cannot be reached: ${error.code ?? error.message}.`);
}

/** Does one handshake; returns what the other side says it is. With a pin, it has proved to be that node. */
function handshake(place: Place, pin: Pin | null, expected: Bytes | null): Promise<Pin> {
  const name = joined(place.host, place.port);
  return new Promise((resolve, reject) => {
    const socket = connect(options(place, pin));
    socket.setTimeout(HANDSHAKE_MS, () => socket.destroy(new Error("no answer")));
    socket.once("error", (error) => reject(dialError(name, error)));
    socket.once("close", () => reject(new ConnectionLostError(`The node at ${name} ended the connection.`)));
    socket.once("secureConnect", () => {
      try {
        resolve(pin ?? peerOf(socket, expected));
      } catch (error) {
        reject(error);
      }
      socket.destroy();
    });
  });
}

/** Returns the pin of the node at a place: the known one, or one that is met, proved by a handshake, and kept. */
async function pinOf(place: Place, expected: Bytes | null, store: DeviceStorage): Promise<Pin> {
  const address = joined(place.host.toLowerCase().replace(/\.$/, ""), place.port);
  const known = store instanceof DirectoryStorage ? await store.pin(address) : null;
  if (known !== null && (expected === null || equal(known.node, expected))) return known;
  const found = await handshake(place, null, expected);
  if (expected !== null && !equal(found.node, expected)) {
    throw new TrustError(
      `The node at ${address} has the fingerprint ${fingerprint(found.node)}, but the one asked for is ` +
        `${fingerprint(expected)}: get a new link, and do not go on if it stays so.`,
    );
  }
  await handshake(place, found, expected);
  if (store instanceof DirectoryStorage) await store.putPin(address, found);
  return found;
}

class TlsWire implements Wire {
  private readonly socket: TLSSocket;
  private opened = false;
  private over = false;

  constructor(place: Place, pin: Pin, hears: Hears) {
    const name = joined(place.host, place.port);
    const socket = connect(options(place, pin));
    this.socket = socket;
    socket.setNoDelay(true);
    let reason = "the connection ended";
    socket.once("connect", () => this.over || hears.reached());
    socket.once("secureConnect", () => {
      if (this.over) return;
      this.opened = true;
      hears.open();
    });
    socket.on("data", (data: Buffer) => this.over || hears.data(data));
    socket.on("error", (error: NodeJS.ErrnoException) => {
      reason = error.message;
      if (this.over || this.opened) return;
      this.over = true;
      hears.failed(dialError(name, error), { refused: true, fatal: untrusted(error) });
    });
    socket.once("close", () => {
      if (this.over) return;
      this.over = true;
      if (this.opened) hears.ended(reason);
      else hears.failed(new ConnectionLostError(`The node at ${name} ended the connection.`), { refused: true });
    });
  }

  send(frames: Uint8Array[]): void {
    if (!this.opened || this.socket.destroyed) return;
    this.socket.cork();
    for (const frame of frames) this.socket.write(frame);
    this.socket.uncork();
  }

  close(): void {
    this.over = true;
    if (!this.opened || this.socket.destroyed) {
      this.socket.destroy();
      return;
    }
    this.socket.end();
    // What the other side does not take is not waited for.
    setTimeout(() => this.socket.destroy(), 1_000).unref();
  }
}

/** The platform of Node.js. */
export const node: Platform = {
  transport: "tls",
  storage: async (spec) => {
    if (spec === undefined) throw new UsageError("Name a directory for this client's key: `storage`.");
    return new DirectoryStorage(spec);
  },
  find: async (place: Place, expected: Bytes | null, store: DeviceStorage): Promise<Target> => {
    if (place.transport === "websocket") {
      if (expected === null) throw new UsageError("The node's id is missing: give `node`, or use host and port.");
      return webSocketTarget(place, expected);
    }
    const pin = await pinOf(place, expected, store);
    return {
      name: joined(place.host, place.port),
      node: pin.node,
      pacing: { everyMs: RACE_EVERY_MS, openMax: RACE_OPEN_MAX },
      dial: (hears) => new TlsWire(place, pin, hears),
    };
  },
  watch: () => () => undefined,
  label: () => {
    const name = ((): string => {
      try {
        return userInfo().username;
      } catch {
        return String(process.getuid?.() ?? "");
      }
    })();
    return `${name}@${hostname()}`;
  },
};

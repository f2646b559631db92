/** Browsers: WebSockets, and a key in IndexedDB that no script can read. */

import type { Bytes } from "./bytes.js";
import { checkCounter, counterAfter, type DeviceKey, type DeviceStorage, generatePair, WebKey } from "./device.js";
import { Code, SternaError, UsageError } from "./errors.js";
import type { Place, Platform, Target } from "./platform.js";
import { webSocketTarget } from "./websocket.js";

const STORE = "device";
const KEY = "key";
const COUNTER = "counter";

/** Key and counter in an IndexedDB database; all tabs of one origin share them. */
export class IndexedStorage implements DeviceStorage {
  private database: Promise<IDBDatabase> | null = null;
  private key: Promise<DeviceKey> | null = null;

  constructor(private readonly name = "sterna") {}

  loadKey(): Promise<DeviceKey> {
    this.key ??= this.readKey();
    return this.key;
  }

  private async readKey(): Promise<DeviceKey> {
    // A transaction ends while a key is being made: it is made first, and kept only if no other tab was faster.
    const known = await this.change<CryptoKeyPair>(KEY, (found) => found);
    if (known !== undefined) return WebKey.of(known);
    const made = await generatePair();
    const kept = await this.change<CryptoKeyPair>(KEY, (found) => found ?? made);
    return WebKey.of(kept ?? made);
  }

  async nextCounter(wallNs: bigint): Promise<bigint> {
    const value = await this.change<string>(COUNTER, (found) => String(counterAfter(BigInt(found ?? "0"), wallNs)));
    return BigInt(value!);
  }

  async raiseCounter(atLeast: bigint): Promise<void> {
    checkCounter(atLeast);
    await this.change<string>(COUNTER, (found) => (BigInt(found ?? "0") < atLeast ? String(atLeast) : found));
  }

  /** Forgets the key: with the next one this browser is another device, which no link has let in yet. */
  async forget(): Promise<void> {
    this.key = null;
    await this.change(KEY, () => undefined);
  }

  /** Reads one value and writes what `update` makes of it, in one transaction; returns that. */
  private async change<T>(name: string, update: (found: T | undefined) => T | undefined): Promise<T | undefined> {
    this.database ??= this.open();
    const database = await this.database;
    return new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, "readwrite");
      const store = transaction.objectStore(STORE);
      let value: T | undefined;
      const asked = store.get(name);
      asked.onsuccess = () => {
        const found = asked.result as T | undefined;
        try {
          value = update(found);
        } catch (error) {
          transaction.abort();
          reject(error);
          return;
        }
        if (value !== found) store.put(value, name);
      };
      transaction.oncomplete = () => resolve(value);
      transaction.onerror = transaction.onabort = () => reject(storageError());
    });
  }

  private open(): Promise<IDBDatabase> {
    return new Promise((resolve, reject) => {
      if (globalThis.indexedDB === undefined) {
        reject(storageError());
        return;
      }
      const asked = globalThis.indexedDB.open(this.name, 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore(STORE);
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = asked.onblocked = () => reject(storageError());
    });
  }
}

function storageError(): SternaError {
  return new SternaError(
    Code.STORAGE,
    "This browser keeps nothing for this page: leave private mode, or allow it to store data.",
  );
}

// The first that is named counts: Edge names Chrome and Safari as well, Android Linux.
const BROWSERS = ["Edge=Edg", "Opera=OPR", "Firefox", "Chrome", "Safari"];
const SYSTEMS = ["Android", "ChromeOS=CrOS", "iPhone", "iPad", "Windows", "macOS=Mac OS", "Linux"];

/** Returns what a browser is called by its user agent and kind of device: "Chrome on Android, phone". */
export function browserLabel(agent: string, kind: string): string {
  const named = (known: string[]): string | undefined =>
    known.map((one) => one.split("=")).find((one) => agent.includes(one.at(-1)!))?.[0];
  const system = named(SYSTEMS);
  return `${named(BROWSERS) ?? "Browser"}${system ? ` on ${system}` : ""}${kind && `, ${kind}`}`;
}

/** Returns the kind of device: by its pointer and its screen. */
function deviceKind(): string {
  const { matchMedia, screen } = globalThis;
  if (!matchMedia) return "";
  if (!matchMedia("(pointer: coarse)").matches) return "desktop";
  return Math.min(screen.width, screen.height) < 600 ? "phone" : "tablet";
}

/** The platform of browsers. */
export const browser: Platform = {
  transport: "websocket",
  storage: async (spec) => new IndexedStorage(spec),
  find: async (place: Place, expected: Bytes | null): Promise<Target> => {
    if (place.transport !== "websocket")
      throw new UsageError("A browser reaches nodes by WebSocket only: use a wss:// address.");
    if (expected === null) throw new UsageError("The node's id is missing: use a share link, or give `node`.");
    return webSocketTarget(place, expected);
  },
  watch: (changed) => {
    const online = (): void => changed("the network changed");
    globalThis.addEventListener?.("online", online);
    return () => globalThis.removeEventListener?.("online", online);
  },
  label: () => browserLabel(globalThis.navigator?.userAgent ?? "", deviceKind()),
};

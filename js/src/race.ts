/** When to suspect a connection, and when to dial (docs/protocol.md, "Noticing trouble"). Times in milliseconds. */

import { BUSY_MS, KEEPALIVE_MS, RACE_EVERY_MS, SILENCE_MS, SUSPECT_MIN_MS } from "./limits.js";

const FAST_UNTIL_MS = 10_000;
const SLOW_UNTIL_MS = 60_000;
const BACKOFF_MAX_MS = 2_000;
const REST_MAX_MS = 8_000;
const SLOWEST_MS = 4_000;

/** How alive the active connection looks; `srtt` is the smoothed round trip of PINGs. */
export class Vitals {
  srtt = 50;
  private heard: number;
  private lastTraffic: number;
  private ping = -1;

  constructor(now: number) {
    this.heard = this.lastTraffic = now;
  }

  /** Begins anew with another connection. */
  renewed(now: number): void {
    this.heard = this.lastTraffic = now;
    this.ping = -1;
  }

  /** Notes that the peer is there. */
  received(now: number): void {
    this.heard = now;
    this.ping = -1;
  }

  /** Notes that session bytes came or went. */
  traffic(now: number): void {
    this.lastTraffic = now;
  }

  /** Notes that a PING goes out. */
  asked(now: number): void {
    this.ping = now;
  }

  /** Notes the PONG for the PING of time `stamp`. */
  answered(stamp: number, now: number): void {
    if (now - stamp >= 0 && now - stamp < 60_000) this.srtt += (now - stamp - this.srtt) / 8;
  }

  /** Returns when `check` is to be called; `owed` says that input is not acknowledged. */
  due(owed: boolean): number {
    if (this.ping >= 0) return this.ping + Math.max(SUSPECT_MIN_MS, 4 * this.srtt);
    const soon = this.heard + SILENCE_MS;
    return owed || soon - this.lastTraffic < BUSY_MS ? soon : this.heard + KEEPALIVE_MS;
  }

  /** Returns "ping" when the peer is to be asked, "no answer" when it is to be suspected, or "". */
  check(now: number, owed: boolean): string {
    if (now < this.due(owed)) return "";
    if (this.ping >= 0) {
      this.ping = -1;
      this.heard = now;
      return "no answer";
    }
    this.ping = now;
    return "ping";
  }
}

/** When to open the next connection: often at first (`every`, in ms), rarer later, backed off where nobody listens. */
export class Race {
  running = false;
  private since = 0;
  private next = 0;
  private refusals = 0;
  private rest = 0;
  private rested = 0;
  private turns = 0;

  /** `random()` gives numbers from 0 to before 1. */
  constructor(
    private readonly random: () => number,
    private readonly every = RACE_EVERY_MS,
    private readonly slowing = false,
  ) {}

  /** Starts a race: the first attempt is due at once. */
  begin(now: number): void {
    this.running = true;
    this.since = this.next = now;
    this.refusals = this.rest = this.rested = this.turns = 0;
  }

  /** Ends the race. */
  end(): void {
    this.running = false;
  }

  /** Tries at once: something changed. */
  hurry(now: number): void {
    this.since = now;
    this.next = Math.min(this.next, now);
    this.refusals = this.turns = 0;
  }

  /** Returns when the next attempt is due, or null. */
  due(): number | null {
    return this.running ? this.next : null;
  }

  /** Returns whether an attempt is to begin now, and counts it. */
  take(now: number): boolean {
    if (!this.running || now < this.next) return false;
    const age = now - this.since;
    const pause = this.slowing ? Math.min(this.every * 2 ** this.turns++, SLOWEST_MS) : this.every;
    this.next = now + Math.max(pause, age < FAST_UNTIL_MS ? 0 : age < SLOW_UNTIL_MS ? 250 : 1_000);
    return true;
  }

  /** Rests once the node's machine took a connection: 1 s, and twice as long for each further one, up to 8 s. */
  connected(now: number): void {
    if (now >= this.rested) {
      this.rest = Math.min(this.rest * 2 || 1_000, REST_MAX_MS);
      this.rested = now + this.rest;
    }
    this.next = Math.max(this.next, this.rested);
  }

  /** Rests after a connection was established: now it is up to the answer. */
  established(now: number): void {
    this.refusals = 0;
    this.next = Math.max(this.next, now + 1_000);
  }

  /** Backs off with full jitter where nobody listens; a silent network costs nothing to be asked again. */
  failed(now: number, refused: boolean): void {
    if (!refused) return;
    this.refusals = Math.min(this.refusals + 1, 16);
    this.next = now + this.random() * Math.min(RACE_EVERY_MS * 2 ** this.refusals, BACKOFF_MAX_MS);
  }

  /** Waits as long as the node asked for, at most 10 s (what is no number counts as no wait). */
  wait(now: number, seconds: number): void {
    const asked = Number.isNaN(seconds) ? 0 : seconds;
    this.next = Math.max(this.next, now + Math.min(Math.max(0.05, asked), 10) * 1_000);
  }
}

/** Errors: what a user reads is one sentence, what a peer reads is a code (docs/protocol.md, section 6). */

/** Codes of ERROR and CLOSE frames; equality is on the number. */
export const Code = {
  OK: 0,
  PROTOCOL: 1,
  BAD_MAGIC: 2,
  BAD_CRC: 3,
  UNKNOWN_TYPE: 4,
  TOO_LARGE: 5,
  TRUNCATED: 6,
  BAD_PAYLOAD: 7,
  BAD_HANDLE: 8,
  GAP: 9,
  TIMEOUT: 10,
  VERSION: 11,
  DENIED: 20,
  EXPIRED: 21,
  STALE: 22,
  SUPERSEDED: 23,
  DISPLACED: 24,
  REVOKED: 25,
  READ_ONLY: 26,
  RATE_LIMITED: 27,
  NOT_FOUND: 30,
  EXISTS: 31,
  NO_AGENT: 32,
  AGENT_LOST: 33,
  ENDED: 34,
  RESYNC: 35,
  LIMIT: 40,
  BUSY: 41,
  DRAINING: 42,
  STORAGE: 43,
  MOVED: 50,
  UNSUPPORTED: 51,
  BAD_REQUEST: 52,
  INTERNAL: 60,
} as const;

const NAMES = new Map<number, string>(Object.entries(Code).map(([name, code]) => [code, name.toLowerCase()]));

/** Returns a code's name as the wire has it, `internal` for a number that is none. */
export function codeName(code: number): string {
  return NAMES.get(code) ?? "internal";
}

/** The root of all errors raised on purpose: one sentence that says what happened and what to do, and a code. */
export class SternaError extends Error {
  readonly code: number;
  /** The code's name, such as `denied`. */
  readonly codeName: string;

  constructor(code: number, message: string, name = codeName(code)) {
    super(message);
    this.name = new.target.name;
    this.code = code;
    this.codeName = name;
  }
}

/** Whether a node's refusal is for good: asking again without something new is of no use. */
export function isFinal(code: number): boolean {
  return code === Code.DENIED || code === Code.EXPIRED || code === Code.REVOKED;
}

/** The caller asked for something that makes no sense. */
export class UsageError extends SternaError {
  constructor(message: string) {
    super(Code.BAD_REQUEST, message);
  }
}

/** The peer broke the protocol; carries the code of the ERROR frame that answers it. */
export class ProtocolError extends SternaError {}

/** No connection could be made, or it was lost or given up; its `codeName` is `unreachable`. */
export class ConnectionLostError extends SternaError {
  constructor(message: string) {
    super(Code.TIMEOUT, message, "unreachable");
  }
}

/** A key, certificate, link or pin is missing, wrong or readable by others. */
export class TrustError extends SternaError {
  constructor(message: string) {
    super(Code.DENIED, message);
  }
}

/** What an ERROR may say beside its code and text: seconds to wait, where a moved session lives, the code's number. */
export interface RefusalDetails {
  retryAfter?: number | null;
  address?: string | null;
  value?: bigint | null;
}

/** The node answered with an ERROR frame. */
export class RefusedError extends SternaError {
  readonly retryAfter: number | null;
  readonly address: string | null;
  readonly value: bigint | null;

  constructor(code: number, message: string, details: RefusalDetails = {}) {
    super(code, message);
    this.retryAfter = details.retryAfter ?? null;
    this.address = details.address ?? null;
    this.value = details.value ?? null;
  }
}

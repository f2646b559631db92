/** Every bound in one place, unit last in the name (docs/protocol.md, section 4). */

export const HEADER_BYTES = 15;
export const PAYLOAD_MAX_BYTES = 65_535;
export const CONTROL_MAX_BYTES = 32_768;
export const PING_MAX_BYTES = 64;
export const POSITION_MAX = (1n << 63n) - 1n;

export const WINDOW_BYTES = 256 * 1024;
export const ACK_EVERY_BYTES = 64 * 1024;
export const ACK_JOIN_MS = 100;
export const ACK_DELAY_MS = 250;
/** Payload bytes of one frame of input: small enough to leave room for what is typed meanwhile. */
export const CHUNK_BYTES = 32_768;

export const HANDSHAKE_MS = 10_000;
export const ANSWER_MS = 2_000;
export const KEEPALIVE_MS = 15_000;
export const SILENCE_MS = 1_000;
export const BUSY_MS = 10_000;
export const SUSPECT_MIN_MS = 200;
export const RACE_EVERY_MS = 50;
export const RACE_OPEN_MAX = 20;
export const CALL_MS = 10_000;
export const CALL_IDLE_MS = 20_000;

export const SNAPSHOT_MAX_BYTES = 8 * 1024 * 1024;
export const SNAPSHOT_PART_BYTES = 60_000;
export const DECOMPRESSED_MAX_BYTES = 32 * 1024 * 1024;
export const TEXT_SHOWN_MAX_CHARS = 4_096;
export const VALUE_DEPTH_MAX = 32;
export const EVENTS_KEPT_MAX = 1_000;
export const LINK_MAX_CHARS = 2_048;
export const LINK_FIELDS_MAX = 32;

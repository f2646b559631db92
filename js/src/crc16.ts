/** CRC-16/UMTS over frames: polynomial 0x8005, start 0, nothing reflected (docs/protocol.md, section 1). */

const TABLE = new Uint16Array(256);
for (let byte = 0; byte < 256; byte++) {
  let crc = byte << 8;
  for (let bit = 0; bit < 8; bit++) crc = crc & 0x8000 ? ((crc << 1) ^ 0x8005) & 0xffff : (crc << 1) & 0xffff;
  TABLE[byte] = crc;
}

/** Returns the CRC of `data` from `start` to before `end`, going on from `crc`. */
export function crc16(data: Uint8Array, crc = 0, start = 0, end = data.length): number {
  for (let at = start; at < end; at++) crc = ((crc << 8) & 0xff00) ^ TABLE[(crc >> 8) ^ data[at]];
  return crc;
}

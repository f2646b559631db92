/** Full resets (RIS, ESC c): each makes the terminal anew, which takes as long as thousands of letters. */

const ESC = 0x1b;
const RIS = 0x63;
const RESETS_MAX = 8;

/** Returns a piece of output without what stands before the last resets in it: nothing of that is to be seen. */
export function withoutManyResets(piece: Uint8Array): Uint8Array {
  let resets = 0;
  // After ESC a terminal begins a new sequence whatever it was in: these two bytes are always a reset.
  for (let at = piece.length - 1; at > 0; at--)
    if (piece[at] === RIS && piece[at - 1] === ESC && ++resets === RESETS_MAX) return piece.subarray(at - 1);
  return piece;
}

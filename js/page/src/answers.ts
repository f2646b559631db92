/**
 * Keeps the terminal from answering what it shall not answer: history and pictures, and whatever another device answers.
 *
 * An answer reaches the program as if it had been typed (docs/protocol.md, section 4; `typist`).
 */

import type { IFunctionIdentifier, Terminal } from "@xterm/xterm";
import { clipboardText } from "./input.js";

/** Every sequence that xterm.js answers by itself (InputHandler and CoreBrowserTerminal, where they send data). */
const QUERIES: readonly IFunctionIdentifier[] = [
  { final: "c" },
  { prefix: ">", final: "c" },
  { prefix: "=", final: "c" },
  { final: "n" },
  { prefix: "?", final: "n" },
  { intermediates: "$", final: "p" },
  { prefix: "?", intermediates: "$", final: "p" },
  { prefix: ">", final: "q" },
  { final: "t" },
];
const COLOURS = [4, 10, 11, 12];

export class Answers {
  /** Whether what is written now may be answered. */
  live = false;
  private muted = false;

  constructor(terminal: Terminal, clipboard: (text: string) => void) {
    const { parser } = terminal;
    const refused = (): boolean => !this.live;
    for (const id of QUERIES) parser.registerCsiHandler(id, refused);
    parser.registerDcsHandler({ intermediates: "$", final: "q" }, refused);
    for (const number of COLOURS) parser.registerOscHandler(number, (data) => !this.live && data.includes("?"));
    // Focus reporting says at once where the focus is: who only replays says nothing.
    parser.registerCsiHandler({ prefix: "?", final: "h" }, (params) => {
      if (!this.live && params.includes(1004)) this.mute();
      return false;
    });
    parser.registerOscHandler(52, (data) => {
      const text = this.live ? clipboardText(data) : null;
      if (text) clipboard(text);
      return true;
    });
  }

  /** Whether what the terminal sends right now is an answer that nobody shall get. */
  get silenced(): boolean {
    return this.muted;
  }

  private mute(): void {
    this.muted = true;
    queueMicrotask(() => (this.muted = false));
  }
}

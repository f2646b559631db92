/** Keys as terminals send them, and what is dangerous in a paste. */

/** The keys of the on-screen row that are no characters. */
export type KeyName =
  "Escape" | "Tab" | "ArrowUp" | "ArrowDown" | "ArrowLeft" | "ArrowRight" | "Home" | "End" | "PageUp" | "PageDown";

export interface Modifiers {
  ctrl: boolean;
  alt: boolean;
}

const FINALS: { [name: string]: string } = {
  ArrowUp: "A",
  ArrowDown: "B",
  ArrowRight: "C",
  ArrowLeft: "D",
  End: "F",
  Home: "H",
};

/** Returns what a key sends (xterm's control sequences, "PC-Style Function Keys"). */
export function keySequence(key: KeyName, { ctrl, alt }: Modifiers, applicationCursor: boolean): string {
  const modifier = 1 + (alt ? 2 : 0) + (ctrl ? 4 : 0);
  const final = FINALS[key];
  if (final !== undefined) {
    if (modifier > 1) return `\x1b[1;${modifier}${final}`;
    return `\x1b${applicationCursor ? "O" : "["}${final}`;
  }
  if (key === "PageUp" || key === "PageDown") {
    const number = key === "PageUp" ? 5 : 6;
    return modifier > 1 ? `\x1b[${number};${modifier}~` : `\x1b[${number}~`;
  }
  return (alt ? "\x1b" : "") + (key === "Tab" ? "\t" : "\x1b");
}

/** Returns what typed text becomes with Ctrl or Alt held for its first character. */
export function withModifiers(text: string, { ctrl, alt }: Modifiers): string {
  if (!text || text.startsWith("\x1b")) return text;
  const first = String.fromCodePoint(text.codePointAt(0)!);
  return (alt ? "\x1b" : "") + (ctrl ? control(first) : first) + text.slice(first.length);
}

function control(letter: string): string {
  if (letter === " " || letter === "2") return "\x00";
  if (letter === "?" || letter === "8") return "\x7f";
  if (letter === "/" || letter === "-" || letter === "7") return "\x1f";
  if (/^[3-6]$/.test(letter)) return String.fromCharCode(letter.charCodeAt(0) - 0x18);
  const code = letter.toUpperCase().charCodeAt(0);
  return code >= 0x40 && code <= 0x5f ? String.fromCharCode(code & 0x1f) : letter;
}

// biome-ignore lint: control characters are what is looked for
const CONTROLS = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/;
const CONTROLS_ALL = new RegExp(CONTROLS.source, "g");

/** What a paste has that deserves a question. */
export interface PasteRisk {
  lines: number;
  controls: boolean;
}

/** Returns why a paste deserves a question, or null: it has line ends, or control characters. */
export function pasteRisk(text: string): PasteRisk | null {
  const lines = text.replace(/\r\n|\r/g, "\n").split("\n");
  const ended = lines.length > 1;
  if (lines.at(-1) === "") lines.pop();
  const controls = CONTROLS.test(text);
  return ended || controls ? { lines: lines.length, controls } : null;
}

/** Returns a text without control characters other than tabs and line ends. */
export function withoutControls(text: string): string {
  return text.replace(CONTROLS_ALL, "");
}

/** Returns a text in which control characters are visible. */
export function visible(text: string): string {
  return text
    .replace(CONTROLS_ALL, (letter) => {
      const code = letter.charCodeAt(0);
      return code === 0x7f ? "\u2421" : code < 0x20 ? String.fromCharCode(0x2400 + code) : "\ufffd";
    })
    .replace(/\r\n?/g, "\n");
}

/** Returns what goes to the program for a paste, as xterm does it; nothing in it can end the brackets early. */
export function pasteBytes(text: string, bracketed: boolean): string {
  const lines = text.replace(/\r?\n/g, "\r");
  if (!bracketed) return lines;
  return `\x1b[200~${lines.replace(/[\x1b\x9b]/g, "")}\x1b[201~`;
}

/** Returns the text of an OSC 52 that writes the clipboard, null if it is none (RFC 4648; xterm's control sequences). */
export function clipboardText(data: string): string | null {
  const match = /^[a-z0-7]*;([A-Za-z0-9+/]*={0,2})$/.exec(data);
  if (match === null || match[1].length > 1_400_000) return null;
  try {
    const raw = Uint8Array.from(atob(match[1]), (letter) => letter.charCodeAt(0));
    return new TextDecoder("utf-8", { fatal: true }).decode(raw);
  } catch {
    return null;
  }
}

/** One terminal: xterm.js with its size, colours, links, selection, and output that is awaited. */

import { UnicodeGraphemesAddon } from "@xterm/addon-unicode-graphemes";
import { WebLinksAddon } from "@xterm/addon-web-links";
import { WebglAddon } from "@xterm/addon-webgl";
import { Terminal } from "@xterm/xterm";
import { Answers } from "./answers.js";
import { pasteBytes } from "./input.js";
import { withoutManyResets } from "./resets.js";
import { FONT_MIN_PX, type Settings } from "./store.js";
import { contrast, terminalTheme } from "./themes.js";

const SCROLLBACK_LINES = 5_000;
const COLS_MIN = 20;
const ROWS_MIN = 4;
/** Text that is smaller is not made to fit: one scrolls. */
const READABLE_PX = 10;
/** As in page.css. */
const SCROLLBAR_PX = 8;
const PIECE_BYTES = 4_096;
const PIECE_MIN_BYTES = 256;
const TURN_MS = 12;

export interface Size {
  cols: number;
  rows: number;
}

/** What a screen tells. */
export interface ScreenEvents {
  typed(text: string): void;
  /** What the terminal answers to a piece of output, all of it at once. */
  answered(text: string): void;
  mouse(data: string): void;
  bell(): void;
  link(url: string, shown: string): void;
  clipboard(text: string): void;
  /** The room for the terminal changed: what would fit. */
  room(size: Size): void;
}

export class Screen {
  readonly terminal: Terminal;
  readonly answers: Answers;
  /** The size that the session has if that is not ours: then the text is made smaller, or scrolled. */
  private foreign: Size | null = null;
  private webgl: WebglAddon | null = null;
  private base: number;
  private opened = false;
  private gone = false;
  private turned = 0;
  /** Where it was scrolled to by itself. */
  private followed = { x: 0, y: 0 };
  private piece = PIECE_BYTES;
  private answer = "";
  private readonly observer = new ResizeObserver(() => this.refit());
  private last: Size = { cols: 80, rows: 24 };

  constructor(
    readonly host: HTMLElement,
    settings: Settings,
    dark: boolean,
    private readonly events: ScreenEvents,
  ) {
    this.base = settings.fontSize;
    this.terminal = new Terminal({
      allowProposedApi: true,
      cursorBlink: false,
      cursorInactiveStyle: "outline",
      fontFamily: 'ui-monospace, "Cascadia Mono", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace',
      fontSize: settings.fontSize,
      lineHeight: 1.1, // with less, elements cut underscores off
      macOptionClickForcesSelection: true,
      minimumContrastRatio: contrast(dark),
      screenReaderMode: settings.screenReader,
      scrollback: SCROLLBACK_LINES,
      theme: terminalTheme(dark),
      linkHandler: { activate: (_event, url, range) => events.link(url, this.textAt(range.start, range.end)) },
    });
    const { terminal } = this;
    terminal.loadAddon(new UnicodeGraphemesAddon());
    // Programs count cells by code points: so does the picture that the agent sends.
    terminal.unicode.activeVersion = "15";
    terminal.loadAddon(new WebLinksAddon((_event, url) => events.link(url, url)));
    this.answers = new Answers(terminal, (text) => events.clipboard(text));
    terminal.onData((text) => {
      if (this.answers.live) this.answer += text;
      else if (!this.answers.silenced) events.typed(text);
    });
    terminal.onBinary((data) => events.mouse(data));
    terminal.onBell(() => events.bell());
    terminal.onCursorMove(() => this.foreign && requestAnimationFrame(() => this.showCursor(false)));
    this.observer.observe(host);
  }

  /** Puts the terminal into the page; its host must be visible. */
  open(): void {
    if (this.opened) return;
    this.opened = true;
    this.terminal.open(this.host);
    whenPixelsFit(this.host, () => this.accelerate());
    this.refit();
  }

  /** Draws by WebGL, which is fast, where there is any; until then, and else, with elements. */
  private accelerate(): void {
    const wanted = new URLSearchParams(location.search).get("renderer");
    if (this.gone || wanted === "dom" || (wanted !== "webgl" && !fastGraphics())) return;
    try {
      const webgl = new WebglAddon();
      webgl.onContextLoss(() => {
        webgl.dispose();
        this.webgl = null;
      });
      this.terminal.loadAddon(webgl);
      this.webgl = webgl;
    } catch {
      this.webgl = null;
    }
  }

  /** How it is drawn. */
  get renderer(): "webgl" | "dom" {
    return this.webgl === null ? "dom" : "webgl";
  }

  /** What fits into the room there is. */
  get room(): Size {
    return this.last;
  }

  /**
   * Writes; resolves when the terminal has dealt with it. `live`: questions in it are answered.
   *
   * It is written at once: xterm.js waits for a timer before each piece, which takes 4 ms, and a second in pages that
   * are hidden. After a frame's time the page gets its turn; where a piece takes longer, the next one is smaller.
   */
  async write(data: Uint8Array, live: boolean): Promise<void> {
    for (let at = 0; at < data.length && !this.gone; ) {
      const begun = performance.now();
      this.answers.live = live;
      const piece = withoutManyResets(data.subarray(at, at + this.piece));
      (this.terminal as unknown as Hidden)._core._writeBuffer.writeSync(piece);
      this.answers.live = false;
      const { answer } = this;
      this.answer = "";
      if (answer) this.events.answered(answer);
      at += this.piece;
      const now = performance.now();
      const slow = now - begun >= TURN_MS;
      this.piece = slow ? Math.max(PIECE_MIN_BYTES, this.piece / 2) : Math.min(PIECE_BYTES, this.piece * 2);
      if (now - this.turned < TURN_MS) continue;
      await turn();
      this.turned = performance.now();
    }
  }

  /** Takes another session's size than our own, or (null) ours. */
  show(size: Size | null): void {
    const own = size !== null && size.cols === this.last.cols && size.rows === this.last.rows;
    this.foreign = own ? null : size;
    this.refit();
  }

  /** The size that is shown and is not ours, or null. */
  get shownForeign(): Size | null {
    return this.foreign;
  }

  /** Whether only a part of it can be seen. */
  get cut(): boolean {
    const { host } = this;
    const screen = this.foreign === null ? null : host.querySelector(".xterm-screen");
    return screen !== null && (screen.clientWidth > host.clientWidth || screen.clientHeight > host.clientHeight);
  }

  /** Fits the terminal to its host, or to the size that the session has. */
  refit(): void {
    if (!this.opened || !this.host.clientWidth || !this.host.clientHeight) return;
    this.font(this.base);
    const { width, height } = (this.terminal as unknown as Hidden)._core._renderService.dimensions.css.cell;
    if (!width || !height) return;
    const cols = Math.floor((this.host.clientWidth - SCROLLBAR_PX) / width);
    const rows = Math.floor(this.host.clientHeight / height);
    const room = { cols: Math.max(COLS_MIN, cols), rows: Math.max(ROWS_MIN, rows) };
    const changed = room.cols !== this.last.cols || room.rows !== this.last.rows;
    this.last = room;
    const { foreign } = this;
    if (foreign === null) this.resize(room);
    else {
      const wide = Math.min(1, cols / foreign.cols);
      const whole = this.base * Math.min(wide, rows / foreign.rows);
      const px = whole < READABLE_PX ? this.base * wide : whole;
      this.font(Math.min(this.base, Math.max(READABLE_PX, Math.floor(px * 2) / 2)));
      this.resize(foreign);
      requestAnimationFrame(() => this.showCursor(true));
    }
    this.host.classList.toggle("foreign", foreign !== null);
    if (changed) this.events.room(room);
  }

  private resize({ cols, rows }: Size): void {
    if (cols !== this.terminal.cols || rows !== this.terminal.rows) this.terminal.resize(cols, rows);
  }

  /** Scrolls a terminal that is too large for the window to where the cursor is, unless the user looks elsewhere. */
  private showCursor(always: boolean): void {
    const screen = this.host.querySelector(".xterm-screen");
    if (this.foreign === null || screen === null) return;
    const { scrollLeft, scrollTop } = this.host;
    if (!always && Math.hypot(scrollLeft - this.followed.x, scrollTop - this.followed.y) > 2) return;
    const { cursorX, cursorY } = this.terminal.buffer.active;
    const [width, height] = [screen.clientWidth / this.terminal.cols, screen.clientHeight / this.terminal.rows];
    // Whole cells: half a line at the top cannot be read.
    const left = Math.ceil(cursorX + 4 - this.host.clientWidth / width) * width;
    this.host.scrollTo(left, Math.ceil(cursorY + 1 - this.host.clientHeight / height) * height);
    this.followed = { x: this.host.scrollLeft, y: this.host.scrollTop };
  }

  private font(px: number): void {
    if (this.terminal.options.fontSize !== px) this.terminal.options.fontSize = px;
  }

  /** Takes over changed settings. */
  configure(settings: Settings, dark: boolean): void {
    const { options } = this.terminal;
    this.base = Math.max(FONT_MIN_PX, settings.fontSize);
    options.theme = terminalTheme(dark);
    options.minimumContrastRatio = contrast(dark);
    options.screenReaderMode = settings.screenReader;
    this.refit();
  }

  /** Pastes what is known to be harmless, or was confirmed. */
  paste(text: string): void {
    this.terminal.input(pasteBytes(text, this.terminal.modes.bracketedPasteMode));
  }

  /** The text of the screen and what was scrolled away, at most this many lines, for those who cannot select in it. */
  text(lines: number): string {
    const buffer = this.terminal.buffer.active;
    const out: string[] = [];
    for (let y = Math.max(0, buffer.length - lines); y < buffer.length; y++) {
      const line = buffer.getLine(y);
      if (line === undefined) continue;
      const text = line.translateToString(true);
      if (line.isWrapped && out.length) out[out.length - 1] += text;
      else out.push(text);
    }
    return out.join("\n").trimEnd();
  }

  private textAt(start: { x: number; y: number }, end: { x: number; y: number }): string {
    const buffer = this.terminal.buffer.active;
    let text = "";
    for (let y = start.y; y <= end.y; y++) {
      const line = buffer.getLine(y - 1);
      text += line?.translateToString(true, y === start.y ? start.x - 1 : 0, y === end.y ? end.x : undefined) ?? "";
    }
    return text;
  }

  dispose(): void {
    this.gone = true;
    this.observer.disconnect();
    this.terminal.dispose();
  }
}

const turns: (() => void)[] = [];
const channel = new MessageChannel();
channel.port1.onmessage = () => turns.shift()?.();

/** Resolves in another turn of the event loop, in hidden pages, too. */
function turn(): Promise<void> {
  return new Promise((resolve) => {
    turns.push(resolve);
    channel.port2.postMessage(null);
  });
}

/** Tells whether WebGL is done by a graphics processor: done by the main one, it is far slower than elements. */
function fastGraphics(): boolean {
  const context = document.createElement("canvas").getContext("webgl2", { failIfMajorPerformanceCaveat: true });
  if (context === null) return false;
  const info = context.getExtension("WEBGL_debug_renderer_info");
  const name = String(context.getParameter(info?.UNMASKED_RENDERER_WEBGL ?? context.RENDERER));
  context.getExtension("WEBGL_lose_context")?.loseContext();
  return !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(name);
}

/**
 * Calls back once an element's size in device pixels is known to be what its size and the pixel ratio make of it: where
 * that is not so (under emulated displays), what WebGL draws has the wrong size.
 */
function whenPixelsFit(element: HTMLElement, fits: () => void): void {
  const observer = new ResizeObserver(([entry]) => {
    const [pixels] = entry.devicePixelContentBoxSize ?? [];
    const expected = entry.contentRect.width * devicePixelRatio;
    if (!expected) return; // not visible yet
    observer.disconnect();
    if (pixels === undefined || Math.abs(pixels.inlineSize - expected) < 2) fits();
  });
  try {
    observer.observe(element, { box: "device-pixel-content-box" });
  } catch {
    observer.observe(element); // Safari knows no such box, and neither does xterm.js use it there
  }
}

/** What of xterm.js is not public: its version is pinned, and the page's tests would notice. */
interface Hidden {
  _core: {
    _writeBuffer: { writeSync(data: Uint8Array): void };
    _renderService: { dimensions: { css: { cell: { width: number; height: number } } } };
  };
}

/** Search in the screen and what was scrolled away. */

import type { Terminal } from "@xterm/xterm";
import { button, el, icon } from "./dom.js";

const FOUND_MAX = 1_000;

/** Where a text is: line and column of its first cell, and how many cells it has. */
export interface Found {
  y: number;
  x: number;
  cells: number;
}

/** Lines of a terminal as they were written: those that were too long are one, with the columns of their letters. */
export interface Row {
  y: number;
  text: string;
  /** Of each UTF-16 unit of `text` (and its end): the cell, counted from the row's first cell. */
  cells: number[];
}

/** Returns where a text is, at most FOUND_MAX times, the last ones; letters of both cases are alike unless `exact`. */
export function findAll(rows: Iterable<Row>, wanted: string, cols: number, exact: boolean): Found[] {
  if (!wanted) return [];
  const needle = exact ? wanted : wanted.toLowerCase();
  const found: Found[] = [];
  for (const { y, text, cells } of rows) {
    const hay = exact ? text : text.toLowerCase();
    // Letters whose lower case is longer would move all columns: then case counts.
    const within = hay.length === text.length ? hay : text;
    for (let at = within.indexOf(needle); at >= 0; at = within.indexOf(needle, at + needle.length)) {
      const [from, to] = [cells[at], cells[at + needle.length]];
      found.push({ y: y + Math.floor(from / cols), x: from % cols, cells: to - from });
    }
  }
  return found.slice(-FOUND_MAX);
}

function* rowsOf(terminal: Terminal): Generator<Row> {
  const buffer = terminal.buffer.active;
  let row: Row | null = null;
  for (let y = 0; y < buffer.length; y++) {
    const line = buffer.getLine(y);
    if (line === undefined) break;
    if (row === null || !line.isWrapped) {
      if (row !== null) yield row;
      row = { y, text: "", cells: [0] };
    }
    const before = row.cells.pop()!;
    const wrapped = buffer.getLine(y + 1)?.isWrapped ?? false;
    const first = (y - row.y) * terminal.cols;
    const text = line.translateToString(!wrapped);
    const wide = /[^\x20-\x7e]/.test(text);
    if (!wide) for (let at = 0; at <= text.length; at++) row.cells.push(first + at);
    else {
      let length = 0;
      for (let x = 0; x < terminal.cols && length < text.length; x++) {
        const letters = line.getCell(x)?.getWidth() === 0 ? "" : line.getCell(x)?.getChars() || " ";
        for (const _unit of letters.split("")) row.cells.push(first + x);
        length += letters.length;
      }
      row.cells.push(wrapped ? first + terminal.cols : Math.max(before, (row.cells.at(-1) ?? 0) + 1));
    }
    row.text += text;
  }
  if (row !== null) yield row;
}

/** The bar to search with. */
export class Find {
  readonly bar: HTMLElement;
  private readonly field: HTMLInputElement;
  private readonly exact: HTMLButtonElement;
  private readonly count: HTMLElement;
  private found: Found[] = [];
  private at = -1;

  constructor(
    private readonly terminal: Terminal,
    private readonly left: () => void,
  ) {
    this.field = el("input", {
      type: "search",
      class: "find-field",
      "aria-label": "Search in the terminal",
      spellcheck: "false",
      autocomplete: "off",
    });
    this.count = el("span", { class: "find-count", role: "status" });
    this.exact = button(
      { class: "tool", "aria-label": "Match case", title: "Match case", "aria-pressed": "false" },
      "Aa",
      () => {
        this.exact.setAttribute("aria-pressed", String(this.exact.getAttribute("aria-pressed") !== "true"));
        this.search();
      },
    );
    this.bar = el(
      "div",
      { class: "find", role: "search", hidden: true },
      this.field,
      this.count,
      this.exact,
      button({ class: "tool", "aria-label": "Previous", title: "Previous (Enter)" }, icon("up"), () => this.go(-1)),
      button({ class: "tool", "aria-label": "Next", title: "Next (Shift+Enter)" }, icon("down"), () => this.go(1)),
      button({ class: "tool", "aria-label": "Close search", title: "Close (Esc)" }, icon("close"), () => this.hide()),
    );
    this.field.addEventListener("input", () => this.search());
    this.bar.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.hide();
      else if (event.key === "Enter" && event.target === this.field) this.go(event.shiftKey ? 1 : -1);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  show(): void {
    this.bar.hidden = false;
    const selected = this.terminal.getSelection();
    if (selected && !selected.includes("\n")) this.field.value = selected;
    this.field.focus();
    this.field.select();
    this.search();
  }

  hide(): void {
    if (this.bar.hidden) return;
    this.bar.hidden = true;
    this.terminal.clearSelection();
    this.left();
  }

  private search(): void {
    const exact = this.exact.getAttribute("aria-pressed") === "true";
    this.found = findAll(rowsOf(this.terminal), this.field.value, this.terminal.cols, exact);
    this.at = this.found.length;
    this.go(-1);
  }

  private go(step: number): void {
    const { found, terminal } = this;
    if (!found.length) {
      this.count.textContent = this.field.value ? "none" : "";
      terminal.clearSelection();
      return;
    }
    this.at = (this.at + step + found.length) % found.length;
    const { x, y, cells } = found[this.at];
    terminal.select(x, y, cells);
    const top = terminal.buffer.active.viewportY;
    if (y < top || y >= top + terminal.rows) terminal.scrollToLine(Math.max(0, y - Math.floor(terminal.rows / 2)));
    this.count.textContent = `${this.at + 1} of ${found.length}`;
  }
}

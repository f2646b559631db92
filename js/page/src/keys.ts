/** The row of keys for devices without them. */

import { button, el } from "./dom.js";
import { type KeyName, keySequence, type Modifiers } from "./input.js";

const REPEAT_AFTER_MS = 400;
const REPEAT_EVERY_MS = 60;

/** What a key shows, is called, and is: a key, a character, or a modifier that counts for the next one. */
const ROWS: readonly (readonly [shown: string, name: string, key: KeyName | "ctrl" | "alt" | null])[] = [
  ["Esc", "Escape", "Escape"],
  ["/", "Slash", null],
  ["|", "Pipe", null],
  ["~", "Tilde", null],
  ["Home", "Home", "Home"],
  ["↑", "Up", "ArrowUp"],
  ["End", "End", "End"],
  ["PgUp", "Page up", "PageUp"],
  ["Tab", "Tab", "Tab"],
  ["Ctrl", "Control", "ctrl"],
  ["Alt", "Alt", "alt"],
  ["-", "Minus", null],
  ["←", "Left", "ArrowLeft"],
  ["↓", "Down", "ArrowDown"],
  ["→", "Right", "ArrowRight"],
  ["PgDn", "Page down", "PageDown"],
];
const REPEATING = /^(Arrow|Page)/;

export class Keys {
  readonly held: Modifiers = { ctrl: false, alt: false };
  private readonly modifiers = new Map<keyof Modifiers, HTMLButtonElement>();

  /** `type` gets what a key sends; `modes` says how cursor keys are sent. */
  constructor(
    row: HTMLElement,
    private readonly type: (text: string) => void,
    private readonly applicationCursor: () => boolean,
  ) {
    for (const [shown, name, key] of ROWS) {
      const attributes = {
        class: "key",
        "aria-label": name,
        "data-key": key ?? shown,
        tabindex: row.firstChild ? -1 : 0,
      };
      const made = button(attributes, el("span", {}, shown), (event) => {
        // A pointer has acted already; this is for the keyboard and for screen readers.
        if (event.detail === 0) this.press(shown, key);
      });
      if (key === "ctrl" || key === "alt") {
        made.setAttribute("aria-pressed", "false");
        this.modifiers.set(key, made);
      }
      this.listen(made, shown, key);
      row.append(made);
    }
    row.addEventListener("keydown", (event) => this.walk(row, event));
  }

  /** Arrow keys go from key to key (ARIA Authoring Practices, "Toolbar"). */
  private walk(row: HTMLElement, event: KeyboardEvent): void {
    const all = [...row.querySelectorAll<HTMLElement>(".key")];
    const at = all.indexOf(event.target as HTMLElement);
    const half = all.length / 2;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -half, ArrowDown: half }[event.key];
    if (at < 0 || step === undefined) return;
    const to = all[(at + step + all.length) % all.length];
    all[at].tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
    event.preventDefault();
  }

  private listen(made: HTMLButtonElement, shown: string, key: KeyName | "ctrl" | "alt" | null): void {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const again = (): void => {
      this.press(shown, key);
      timer = setTimeout(again, REPEAT_EVERY_MS);
    };
    made.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the terminal keeps the focus, and with it the on-screen keyboard
      if (event.button !== 0) return;
      this.press(shown, key);
      clearTimeout(timer);
      if (key !== null && REPEATING.test(key)) timer = setTimeout(again, REPEAT_AFTER_MS);
    });
    for (const end of ["pointerup", "pointercancel", "pointerleave"])
      made.addEventListener(end, () => clearTimeout(timer));
    made.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  private press(shown: string, key: KeyName | "ctrl" | "alt" | null): void {
    if (key === "ctrl" || key === "alt") this.hold(key, !this.held[key]);
    else if (key === null) this.type(shown);
    else {
      const { ctrl, alt } = this.held;
      this.release();
      this.type(keySequence(key, { ctrl, alt }, this.applicationCursor()));
    }
  }

  private hold(key: keyof Modifiers, on: boolean): void {
    this.held[key] = on;
    this.modifiers.get(key)?.setAttribute("aria-pressed", String(on));
  }

  /** Lets go of Ctrl and Alt. */
  release(): void {
    this.hold("ctrl", false);
    this.hold("alt", false);
  }
}

/** One attachment to one session: its tab, its terminal, and what is said about it. */

import { connect, type ConnectOptions, platform, type Session, SternaError } from "../../src/browser.js";
import { Code, isFinal } from "../../src/errors.js";
import { clean } from "../../src/messages.js";
import { button, type Child, el, icon, set } from "./dom.js";
import { ask, askName, confirmEnd, guardedPaste, showText } from "./dialogs.js";
import { Find } from "./find.js";
import type { Grant, Mode } from "./grants.js";
import { withModifiers } from "./input.js";
import type { Keys } from "./keys.js";
import { followFingers } from "./touch.js";
import { Screen, type Size } from "./screen.js";
import type { Settings } from "./store.js";
import { endText, FORGET_KEY, gapText, REVOKED, uncertainText } from "./texts.js";

/** What a tab shall be attached to: a session, or a new one of an agent. */
export interface Aim {
  grant: Grant;
  session: string | null;
  agent: string | null;
  name: string;
  mode: Mode;
  create: boolean;
}

export type TabState = "connecting" | "open" | "trouble" | "ended" | "failed";

/** What a tab needs of the page around it. */
export interface Around {
  readonly settings: Settings;
  readonly dark: boolean;
  readonly keys: Keys;
  address(): string;
  /** Something that is shown outside of the tab changed. */
  changed(tab: Tab): void;
  /** The session is there: `tab.aim` names it from now on. */
  attached(tab: Tab): void;
  leave(tab: Tab): void;
  forget(grant: Grant): void;
  forgetKey(): Promise<void>;
  fontSize(px: number): void;
  isActive(tab: Tab): boolean;
}

interface Info {
  cols?: number;
  rows?: number;
  attachments?: { label: string; mode: string }[];
}

const INFO_WAIT_MS = 1_500;
const TITLE_MAX_CHARS = 200;
const ANSWERS_MAX_CHARS = 16_384;
const SAID_MS = 4_000;
const AGAIN_MIN_MS = 500;
const AGAIN_MAX_MS = 8_000;
const WATCHING = "You are watching: keys are not sent";
/** What other devices are told that this is. */
const LABEL = platform.label();
let numbers = 0;

/** Resolves after a time, or as soon as there is a network again. */
function networkOr(ms: number): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    addEventListener("online", done);
  });
}

export class Tab {
  readonly number = ++numbers;
  readonly label = el("span", { class: "tab-name" });
  readonly handle: HTMLButtonElement;
  readonly head: HTMLElement;
  readonly panel: HTMLElement;
  readonly screen: Screen;
  readonly find: Find;
  session: Session | null = null;
  state: TabState = "connecting";
  /** Since when there is no connection (Date.now()), or null. */
  since: number | null = Date.now();
  others: string[] = [];
  title = "";
  /** Whether it was ever tried to attach. */
  started = false;
  /** A short sentence that passes: what just happened. */
  said = "";
  private unread: "" | "unread" | "bell" = "";
  private readonly notes = el("div", { class: "notes", role: "status" });
  private readonly strip = el("div", { class: "strip", role: "alert", hidden: true });
  private typist = true;
  private trusting = false;
  /** How many characters of answers wait for the session to take them. */
  private answering = 0;
  private clipboardAllowed = false;
  /** What the program wrote last while it was not allowed to; null: nothing yet. */
  private clipboardWanted: string | null = null;
  private abort = new AbortController();
  private asking: Promise<void> | null = null;
  private next: Promise<void> | null = null;
  private saidTimer: ReturnType<typeof setTimeout> | undefined;
  private pinched = 0;

  constructor(
    public aim: Aim,
    private readonly around: Around,
  ) {
    const id = `tab-${this.number}`;
    this.handle = el("button", {
      type: "button",
      id,
      class: "tab",
      role: "tab",
      "aria-selected": "false",
      "aria-controls": `panel-${this.number}`,
      tabindex: -1,
    });
    this.handle.append(el("span", { class: "dot", "aria-hidden": "true" }), this.label);
    // For pointers only: nothing but tabs may be in a list of tabs. Keys have Delete, and the menu.
    const close = button(
      { class: "tab-close", tabindex: -1, "aria-hidden": "true", title: "Leave; the session goes on" },
      icon("close"),
      () => around.leave(this),
    );
    this.head = el("div", { class: "tab-box", role: "presentation" }, this.handle, close);
    const host = el("div", { class: "screen" });
    this.panel = el("section", {
      class: "panel",
      id: `panel-${this.number}`,
      role: "tabpanel",
      "aria-labelledby": id,
      hidden: true,
    });
    this.screen = new Screen(host, around.settings, around.dark, {
      typed: (text) => this.typed(text),
      answered: (text) => this.answer(text),
      mouse: (data) => void this.send(Uint8Array.from(data, (letter) => letter.charCodeAt(0))),
      bell: () => this.mark("bell"),
      link: (url, shown) => void this.follow(url, shown),
      clipboard: (text) => this.offerClipboard(text),
      room: (size) => {
        this.session?.resize(size.cols, size.rows);
        around.changed(this);
      },
    });
    this.find = new Find(this.screen.terminal, () => this.screen.terminal.focus());
    // The terminal is last: it keeps the Tab key.
    this.panel.append(this.find.bar, this.notes, this.strip, host);
    this.screen.terminal.onTitleChange((title) => {
      this.title = clean(title, TITLE_MAX_CHARS);
      this.show();
    });
    host.addEventListener("paste", (event) => this.pasted(event), true);
    const told = ({ key }: KeyboardEvent): void => {
      if (this.watching && (key.length === 1 || key === "Enter")) this.say(WATCHING);
    };
    host.addEventListener("keydown", told, true);
    // Beside a terminal of another device's size, too, keys are for the program.
    host.addEventListener("click", () => this.focus());
    host.addEventListener("drop", (event) => event.preventDefault(), true);
    followFingers(host, this.screen.terminal, {
      spread: (factor, done) => this.pinch(factor, done),
      held: () => this.asText(), // a finger cannot select in the terminal
    });
    this.show();
  }

  /** The name that is shown. */
  get name(): string {
    return this.aim.name || this.aim.agent || "session";
  }

  get watching(): boolean {
    return (this.session?.mode ?? this.aim.mode) === "watch";
  }

  // ---- the session -------------------------------------------------------------------------------------------

  /** Attaches; the panel must be visible, so that the terminal's size is known. */
  async start(): Promise<void> {
    // What is shown from an earlier attachment comes again.
    if (this.started) this.screen.terminal.reset();
    this.started = true;
    this.screen.open();
    const abort = new AbortController();
    this.abort.abort();
    this.abort = abort;
    this.turn("connecting", Date.now());
    this.strip.hidden = true;
    for (let pause = AGAIN_MIN_MS; !abort.signal.aborted; pause = Math.min(pause * 2, AGAIN_MAX_MS)) {
      try {
        const session = await connect(this.options(abort.signal));
        if (abort.signal.aborted) void session.suspend();
        else this.attach(session);
        return;
      } catch (error) {
        if (abort.signal.aborted) return;
        // A node that cannot be reached may be there again soon; everything else needs the user.
        if ((error as SternaError).code !== Code.TIMEOUT) {
          this.fail(error as SternaError);
          return;
        }
      }
      await networkOr(pause);
    }
  }

  private options(abort: AbortSignal): ConnectOptions {
    const { aim } = this;
    const { cols, rows } = this.screen.room;
    const options: ConnectOptions = {
      url: this.around.address(),
      node: aim.grant.node,
      mode: aim.mode,
      cols,
      rows,
      term: "xterm-256color",
      label: LABEL,
      abort,
    };
    if (aim.session === null && aim.grant.session === null) {
      options.token = aim.grant.ticket;
      options.agent = aim.agent ?? undefined;
      options.name = aim.name || undefined;
      options.create = aim.create;
    } else {
      options.ticket = aim.grant.ticket;
      options.session = aim.session ?? aim.grant.session ?? undefined;
    }
    return options;
  }

  private attach(session: Session): void {
    this.session = session;
    const { aim } = this;
    this.aim = {
      ...aim,
      session: session.uid,
      agent: session.agent,
      name: session.name,
      mode: session.mode,
      create: false,
    };
    this.typist = session.mode === "drive";
    const { options } = this.screen.terminal;
    options.disableStdin = session.mode === "watch";
    options.convertEol = session.kind !== "pty"; // there is no terminal behind it that does so
    session.on("data", (data, _position, replayed) => {
      if (!replayed) this.mark("unread");
      return this.screen.write(data, this.typist && !replayed);
    });
    session.on("snapshot", async (data) => {
      // The picture has the session's size, which is ours unless another device types.
      if (!this.typist) await this.learn();
      await this.screen.write(data, false);
    });
    session.on("gap", ({ start, end }) => this.note("gap", gapText(end - start)));
    session.on("uncertain", ({ start, end }) => this.note("uncertain", uncertainText(end - start)));
    session.on("trouble", (trouble) => {
      this.turn(trouble === null ? "open" : "trouble", trouble?.since ?? null);
      if (trouble === null) void this.learn();
    });
    session.on("presence", (event) => this.presence(event));
    session.on("end", (end) => {
      this.turn("ended", null);
      this.close(endText(end), "ended");
    });
    session.on("error", (error) => this.fail(error));
    this.turn("open", null);
    const { cols, rows } = this.screen.room;
    session.resize(cols, rows);
    this.around.attached(this);
    void this.learn();
  }

  private fail(error: SternaError): void {
    this.turn("failed", null);
    this.close(error.code === Code.REVOKED ? REVOKED : error.message, "failed", error.code);
  }

  /** Says that it is over, and what can be done. */
  private close(text: string, kind: "ended" | "failed", code: number = Code.OK): void {
    this.session = kind === "ended" ? this.session : null;
    const { aim } = this;
    const buttons: Child[] = [];
    if (kind === "failed") {
      if (code === Code.REVOKED)
        buttons.push(button({ class: "primary", "data-act": "key" }, FORGET_KEY, () => void this.around.forgetKey()));
      else if (code !== Code.BAD_REQUEST && !isFinal(code))
        buttons.push(button({ class: "primary", "data-act": "retry" }, "Try again", () => void this.start()));
      if (aim.grant.session !== null)
        buttons.push(
          button({ class: "plain", "data-act": "forget" }, "Forget this link", () => this.around.forget(aim.grant)),
        );
    } else if (aim.grant.session === null && aim.agent !== null && aim.mode === "drive")
      buttons.push(button({ class: "primary", "data-act": "anew" }, "Start anew", () => this.anew()));
    buttons.push(button({ class: "plain", "data-act": "leave" }, "Close tab", () => this.around.leave(this)));
    this.strip.replaceChildren(el("span", { class: "strip-text" }, text), ...(buttons as Node[]));
    this.strip.dataset.kind = kind;
    this.strip.hidden = false;
    this.screen.terminal.options.disableStdin = true;
    this.mark("unread");
  }

  private anew(): void {
    this.aim = { ...this.aim, session: null, create: true };
    this.session = null;
    this.notes.replaceChildren();
    this.screen.show(null);
    void this.start();
    this.focus();
  }

  private get over(): boolean {
    return this.state === "ended" || this.state === "failed";
  }

  private turn(state: TabState, since: number | null): void {
    this.state = state;
    this.since = since;
    if (this.over) this.others = [];
    this.show();
    this.around.changed(this);
  }

  /** Ends the session for good, if the user means it. */
  async end(): Promise<void> {
    if (this.session === null || this.watching) return;
    if (await confirmEnd(this.name)) await this.session.close();
  }

  async rename(): Promise<void> {
    const { session } = this;
    if (session === null) return;
    await askName(this.name, async (name) => {
      await session.call("rename", { session: session.uid, name });
      this.renamed(name);
    });
  }

  renamed(name: string): void {
    if (name === this.aim.name) return;
    this.aim = { ...this.aim, name };
    this.show();
    this.around.attached(this);
  }

  /** Leaves; the session goes on without us. */
  leave(): void {
    this.abort.abort();
    void this.session?.suspend();
    this.screen.dispose();
    this.head.remove();
    this.panel.remove();
  }

  // ---- who else is there, and the size -----------------------------------------------------------------------

  private presence({ kind, label, count }: { kind: string; label: string; count: number | null }): void {
    if (kind === "typist") {
      this.typist = count === 1 && !this.watching;
      if (this.typist) this.screen.show(null);
      void this.learn();
    } else if (kind === "joined" || kind === "left") {
      this.say(`${label || "A device"} ${kind}`);
      void this.learn();
    } else if (kind === "storage") {
      this.note("storage", "The node cannot write to its disk: output is kept in memory only, until that is mended.");
    }
  }

  /** Asks the node for the session's size and who is there; one question at a time, and a fresh one each time. */
  private learn(): Promise<void> {
    if (this.asking !== null) {
      this.next ??= this.asking.then(() => {
        this.next = null;
        return this.learn();
      });
      return this.next;
    }
    this.asking = this.askInfo().finally(() => (this.asking = null));
    return this.asking;
  }

  private async askInfo(): Promise<void> {
    const { session } = this;
    if (session === null) return;
    const late = new Promise<null>((resolve) => setTimeout(() => resolve(null), INFO_WAIT_MS));
    const asked = session.call("info", { session: session.uid }).catch(() => null);
    const info = (await Promise.race([asked, late])) as Info | null;
    if (info === null || this.session !== session || this.over) return;
    const labels = (info.attachments ?? []).map((one) =>
      one.mode === "watch" ? `${one.label} (watching)` : one.label,
    );
    const own = this.watching ? `${LABEL} (watching)` : LABEL;
    labels.splice(Math.max(0, labels.indexOf(own)), 1); // one of them is this tab
    this.others = labels;
    const { cols = 0, rows = 0 } = info;
    const { room } = this.screen;
    if (!this.watching && !labels.length && (cols !== room.cols || rows !== room.rows)) {
      session.resize(room.cols, room.rows); // who is alone has a say again
      this.screen.show(null);
    } else this.screen.show(this.typist || !(cols > 0 && rows > 0) ? null : { cols, rows });
    this.around.changed(this);
  }

  /** The size of the session where that is not this terminal's own, or null. */
  get foreign(): Size | null {
    return this.screen.shownForeign;
  }

  // ---- input -------------------------------------------------------------------------------------------------

  private typed(text: string): void {
    const { held } = this.around.keys;
    const changed = held.ctrl || held.alt ? withModifiers(text, held) : text;
    if (changed !== text) this.around.keys.release();
    void this.send(changed);
  }

  private send(data: string | Uint8Array): Promise<void> {
    if (this.over || this.watching || this.session === null) return Promise.resolve();
    return this.session.write(data).catch(() => undefined);
  }

  /** A program that asks and does not read what is answered: what is typed waits, answers do not. */
  private answer(text: string): void {
    if (this.answering >= ANSWERS_MAX_CHARS) return;
    this.answering += text.length;
    void this.send(text).then(() => void (this.answering -= text.length));
  }

  /** Types what the row of keys gives. */
  press(text: string): void {
    const { terminal } = this.screen;
    if (this.watching) this.say(WATCHING);
    else terminal.input(text);
  }

  private pasted(event: ClipboardEvent): void {
    event.preventDefault();
    event.stopImmediatePropagation();
    void this.paste(event.clipboardData?.getData("text/plain") ?? "");
  }

  /** Pastes a text, after a question where it deserves one. */
  async paste(text: string): Promise<void> {
    if (!text || this.watching) return;
    const answer = await guardedPaste(text, this.trusting);
    if (answer !== null) {
      this.trusting = answer.always;
      this.screen.paste(answer.text);
    }
    this.focus();
  }

  /** Pastes what is on the clipboard, where the browser allows that. */
  async pasteClipboard(): Promise<void> {
    try {
      await this.paste(await navigator.clipboard.readText());
    } catch {
      this.say("The browser does not let pages read the clipboard: paste with its own command");
    }
  }

  async copy(): Promise<void> {
    const text = this.screen.terminal.getSelection();
    if (!text) {
      this.say("Nothing is selected");
      return;
    }
    try {
      await navigator.clipboard.writeText(text);
      this.say("Copied");
    } catch {
      this.say("The browser does not let this page write the clipboard");
    }
  }

  asText(): void {
    void showText(this.screen.text(2_000)).then(() => this.focus());
  }

  private offerClipboard(text: string): void {
    const write = (what: string): void => void navigator.clipboard?.writeText(what).catch(() => undefined);
    if (this.clipboardAllowed) {
      write(text);
      return;
    }
    const first = this.clipboardWanted === null;
    this.clipboardWanted = text;
    if (!first) return;
    const allow = button({ class: "link" }, "Allow in this tab", () => {
      this.clipboardAllowed = true;
      this.unnote("clipboard");
      write(this.clipboardWanted ?? text);
      this.focus();
    });
    this.note("clipboard", "The program wants to write to the clipboard.", allow);
  }

  private async follow(url: string, shown: string): Promise<void> {
    const differs = shown.trim() !== url && shown.trim() !== url.replace(/\/$/, "");
    if (differs) {
      const open = el("p", { class: "url" }, url);
      if (!(await ask("open-link", "Open this address?", [open], [{ label: "Open", value: true, primary: true }])))
        return;
    }
    window.open(url, "_blank", "noopener,noreferrer");
  }

  private pinch(factor: number, done: boolean): void {
    this.pinched ||= this.around.settings.fontSize;
    if (done) this.pinched = 0;
    else this.around.fontSize(Math.round(this.pinched * factor));
  }

  // ---- what is shown -----------------------------------------------------------------------------------------

  /** Marks the tab when something happened in it that nobody saw. */
  private mark(what: "unread" | "bell"): void {
    if (this.around.isActive(this) && !document.hidden) return;
    if (this.unread === what || this.unread === "bell") return;
    this.unread = what;
    this.show();
    this.around.changed(this);
  }

  get marked(): string {
    return this.unread;
  }

  /** Takes the mark away: the user is here. */
  seen(): void {
    if (!this.unread) return;
    this.unread = "";
    this.show();
    this.around.changed(this);
  }

  focus(): void {
    this.screen.terminal.focus();
  }

  /** Says something for a few seconds. */
  say(text: string): void {
    this.said = text;
    clearTimeout(this.saidTimer);
    this.saidTimer = setTimeout(() => {
      this.said = "";
      this.around.changed(this);
    }, SAID_MS);
    this.around.changed(this);
  }

  /** Shows a notice until it is dismissed; one of each kind. */
  private note(kind: string, text: string, ...more: Child[]): void {
    this.unnote(kind);
    const away = button({ class: "note-close", "aria-label": "Dismiss" }, icon("close"), () => {
      this.unnote(kind);
      this.focus();
    });
    this.notes.append(el("div", { class: "note", "data-kind": kind }, el("span", {}, text), ...more, away));
  }

  private unnote(kind: string): void {
    for (const note of [...this.notes.children]) if ((note as HTMLElement).dataset.kind === kind) note.remove();
  }

  private show(): void {
    const { name, unread } = this;
    this.label.textContent = name;
    const said = unread === "bell" ? ", bell" : unread ? ", new output" : "";
    set(this.handle, {
      "data-state": this.state,
      "data-mark": unread || null,
      title: this.title || name,
      "aria-label": `${name}${said}`,
    });
    this.panel.dataset.state = this.state;
    this.panel.dataset.uid = this.aim.session ?? "";
    this.panel.dataset.mode = this.watching ? "watch" : "drive";
  }
}

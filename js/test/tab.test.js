/** A tab of the page without a browser: what it answers, pastes, opens and says. Its terminal is the real one. */

import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, beforeEach, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { build } from "esbuild";
import { browserGlobals } from "./document.js";

const SOURCES = join(dirname(dirname(fileURLToPath(import.meta.url))), "page", "src");
const directory = await mkdtemp(join(tmpdir(), "sterna-page-"));
after(() => rm(directory, { recursive: true }));
let page = browserGlobals();

const outfile = join(directory, "page.mjs");
const contents = ["tab", "resets", "fragment"].map((name) => `export * from "./${name}.ts";`).join("\n");
const stdin = { contents: `${contents}\nexport { Terminal } from "@xterm/xterm";`, resolveDir: SOURCES, loader: "ts" };
await build({ stdin, outfile, bundle: true, format: "esm", platform: "browser", mainFields: ["module", "main"] });
const { Tab, Terminal, takeFragment, withoutManyResets } = await import(pathToFileURL(outfile));

beforeEach(() => {
  page = browserGlobals();
});

const QUESTION = "\x1b[6n";
const ANSWER = "\x1b[1;1R";
const settled = () => new Promise((resolve) => setImmediate(resolve));
const bytes = (text) => new TextEncoder().encode(text);

/** A session as the client hands it out, of which the test decides what comes. */
class Session {
  uid = "ab".repeat(16);
  name = "main";
  agent = "main";
  kind = "pty";
  listeners = new Map();
  written = [];
  info = { cols: 100, rows: 30, attachments: [{ label: "other", mode: "drive" }, { label: "", mode: "drive" }] };

  constructor(mode) {
    this.mode = mode;
  }

  on(kind, listen) {
    this.listeners.set(kind, listen);
  }

  resize() {}

  async call() {
    return this.info;
  }

  async write(data) {
    this.written.push(typeof data === "string" ? data : new TextDecoder("latin1").decode(data));
  }

  /** What came: `tell("data", bytes, position, replayed)` and so on. */
  async tell(kind, ...what) {
    await this.listeners.get(kind)(...what);
    await settled();
  }

  async prints(text, { replayed = false } = {}) {
    await this.tell("data", bytes(text), 0, replayed);
  }

  async typist(count) {
    await this.tell("presence", { kind: "typist", label: "", count });
  }
}

function attached(mode = "drive") {
  const keys = { held: { ctrl: false, alt: false }, release() {} };
  const settings = { theme: "dark", fontSize: 14, screenReader: false, keys: "auto" };
  const around = { settings, dark: true, keys, changed() {}, attached() {}, isActive: () => true };
  const aim = { grant: { session: null }, session: null, agent: "main", name: "", mode, create: false };
  const tab = new Tab(aim, around);
  const session = new Session(mode);
  tab.attach(session);
  page.body.append(tab.panel);
  return { tab, session };
}

const note = (kind) => page.body.querySelector(`.note[data-kind=${kind}]`);
const noted = (kind) => note(kind)?.querySelector("span").textContent ?? null;

async function answer(dialog, label) {
  await settled();
  const found = page.body.querySelector(`#${dialog}`);
  assert.ok(found, `there is no question ${dialog}`);
  const buttons = found.querySelector(".answers").children;
  const chosen = buttons.find((one) => one.textContent === label);
  assert.ok(chosen, buttons.map((one) => one.textContent).join());
  chosen.click();
  await settled();
  assert.equal(page.body.querySelector(`#${dialog}`), null);
  return found;
}

// ---- answers ---------------------------------------------------------------------------------------------------

test("questions are answered live, by who types, and never for history or a picture", async () => {
  const { session } = attached();
  await session.prints(QUESTION);
  assert.deepEqual(session.written.splice(0), [ANSWER]);
  await session.prints(QUESTION, { replayed: true });
  await session.tell("snapshot", bytes(QUESTION));
  assert.deepEqual(session.written, []);
  await session.typist(0);
  await session.prints(QUESTION);
  await session.tell("snapshot", bytes(QUESTION));
  assert.deepEqual(session.written, []);
  // What is typed goes, whoever has the turn; with the turn come the answers.
  await session.typist(1);
  await session.prints(QUESTION);
  assert.deepEqual(session.written, [ANSWER]);
});

test("who watches answers nothing, types nothing, and takes no turn", async () => {
  const { tab, session } = attached("watch");
  for (const count of [null, 1]) {
    if (count !== null) await session.typist(count);
    await session.prints(`${QUESTION}\x1b]52;c;aGk=\x07`);
    assert.equal(tab.screen.answers.live, false);
    // That it shall answer would be seen by this, and by the size: the session's own is shown.
    assert.equal(note("clipboard"), null);
    assert.deepEqual(tab.foreign, { cols: 100, rows: 30 });
  }
  tab.press("x");
  tab.screen.terminal.input("x");
  void tab.paste("x\n");
  tab.typed("x");
  await settled();
  assert.equal(page.body.querySelector("#paste"), null);
  assert.deepEqual(session.written, []);
  assert.match(tab.said, /watching: keys are not sent/);
});

test("answers wait for a program that does not read only up to a bound, keys beyond it", async () => {
  const { tab, session } = attached();
  session.write = (data) => {
    session.written.push(data);
    return new Promise(() => undefined);
  };
  const most = 16_384 + 1_024 * ANSWER.length; // and what a last piece of output asks for
  await session.prints(QUESTION.repeat(20_000));
  const answers = session.written.join("");
  assert.match(answers, /^(\x1b\[1;1R)+$/);
  assert.ok(answers.length >= 16_384 && answers.length <= most, answers.length);
  // One input for each piece of output: an input is far dearer than an answer.
  assert.ok(session.written.length < 20, session.written.length);
  tab.screen.terminal.input("x");
  assert.equal(session.written.at(-1), "x");
});

test("where the focus is is told live, and not because of history", async () => {
  const { tab, session } = attached();
  tab.screen.terminal._core.element = { classList: { contains: () => true } };
  await session.prints("\x1b[?1004h", { replayed: true });
  await session.tell("snapshot", bytes("\x1b[?1004h"));
  assert.deepEqual(session.written, []);
  await session.prints("\x1b[?1004h");
  assert.deepEqual(session.written, ["\x1b[I"]);
});

// ---- pasting ---------------------------------------------------------------------------------------------------

test("a tab that was told not to ask still asks about control characters, and does as it is told", async () => {
  const { tab, session } = attached();
  const pasted = async (text, dialog) => {
    const done = tab.paste(text);
    const shown = dialog && (await answer("paste", dialog));
    await settled();
    assert.equal(page.body.querySelector("#paste"), null);
    await done;
    return [session.written.splice(0).join(""), shown];
  };
  assert.deepEqual(await pasted("one\ttwo", null), ["one\ttwo", null]);
  assert.equal((await pasted("one\ntwo\n", "Cancel"))[0], "");
  const asked = tab.paste("one\ntwo\n");
  await settled();
  page.body.querySelector("#paste-always").checked = true;
  await answer("paste", "Paste");
  await asked;
  assert.deepEqual(session.written.splice(0), ["one\rtwo\r"]);
  assert.deepEqual(await pasted("three\nfour\n", null), ["three\rfour\r", null]);
  const [stripped, question] = await pasted("five\x1b[201~\x07\x9b\nsix\t", "Paste without them");
  assert.equal(stripped, "five[201~\rsix\t");
  assert.equal(question.querySelector("#paste-text").textContent, "five\u241b[201~\u2407\ufffd\nsix\t");
  assert.equal((await pasted("seven\x1b[A\n", "Paste as it is"))[0], "seven\x1b[A\r");
  assert.equal((await pasted("eight\x03", "Cancel"))[0], "");
  // None of those questions took the trust back.
  assert.deepEqual(await pasted("nine\nten\n", null), ["nine\rten\r", null]);
  await session.prints("\x1b[?2004h");
  assert.equal((await pasted("a\x1b[201~b\n", "Paste as it is"))[0], "\x1b[200~a[201~b\r\x1b[201~");
});

// ---- notices ---------------------------------------------------------------------------------------------------

test("what was lost is said with how much, until it is dismissed", async () => {
  const { session } = attached();
  assert.deepEqual(["gap", "uncertain", "storage"].map(noted), [null, null, null]);
  await session.tell("gap", { start: 7_000_000, end: 7_000_000 + 3 * 1_048_576 });
  await session.tell("uncertain", { start: 65_536, end: 65_579 });
  await session.tell("presence", { kind: "storage", label: "", count: null });
  assert.match(noted("gap"), /^3\.0 MiB of output were not kept .* right again from here on\.$/);
  assert.match(noted("uncertain"), /^The agent was lost: the last 43 bytes that you typed may or may not have reached/);
  assert.match(noted("storage"), /^The node cannot write to its disk: /);
  // One of each kind, the newest.
  await session.tell("gap", { start: 0, end: 1 });
  assert.match(noted("gap"), /^1 byte /);
  note("gap").querySelector(".note-close").click();
  assert.equal(note("gap"), null);
  assert.notEqual(note("uncertain"), null);
});

test("a program writes the clipboard only once it is allowed, and what it wrote last", async () => {
  const { session } = attached();
  const copies = (text) => `\x1b]52;c;${Buffer.from(text).toString("base64")}\x07`;
  await session.prints(copies("old"), { replayed: true });
  await session.tell("snapshot", bytes(copies("pictured")));
  assert.equal(note("clipboard"), null);
  await session.prints(copies("first"));
  await session.prints(copies("second"));
  assert.match(noted("clipboard"), /^The program wants to write to the clipboard\.$/);
  assert.deepEqual(page.clipboard, []);
  note("clipboard").querySelector(".link").click();
  assert.deepEqual(page.clipboard, ["second"]);
  assert.equal(note("clipboard"), null);
  await session.prints(copies("third"));
  await session.prints(copies("old"), { replayed: true });
  await session.typist(0);
  await session.prints(copies("of another device's turn"));
  assert.deepEqual(page.clipboard, ["second", "third"]);
  assert.deepEqual(session.written, []);
});

test("an offer of the clipboard that was dismissed does not come again", async () => {
  const { session } = attached();
  await session.prints("\x1b]52;c;aGk=\x07");
  note("clipboard").querySelector(".note-close").click();
  await session.prints("\x1b]52;c;aGk=\x07");
  assert.equal(note("clipboard"), null);
  assert.deepEqual(page.clipboard, []);
});

test("where it is over, only what can help is offered, and nothing is typed any more", async () => {
  const strip = () => page.body.querySelector(".strip");
  const offered = () => strip().children.filter((one) => one.tag === "button").map((one) => one.dataset.act);
  const codes = { 10: "retry", 41: "retry", 20: null, 21: null, 25: "key", 52: null }; // by docs/protocol.md, section 6
  for (const [code, wanted] of Object.entries(codes)) {
    const { tab } = attached();
    assert.equal(strip().hidden, true);
    tab.fail({ code: Number(code), message: "It is over." });
    assert.deepEqual(offered(), [wanted, "leave"].filter(Boolean), code);
    assert.equal(strip().hidden, false);
    page = browserGlobals();
  }
  for (const mode of ["drive", "watch"]) {
    const { tab, session } = attached(mode);
    await session.tell("end", { status: 3, signal: null, reason: "" });
    assert.equal(strip().querySelector(".strip-text").textContent, "Ended with status 3.");
    assert.deepEqual(offered(), mode === "drive" ? ["anew", "leave"] : ["leave"]);
    tab.typed("x");
    assert.deepEqual(session.written, []);
    page = browserGlobals();
  }
});

// ---- links -----------------------------------------------------------------------------------------------------

test("a link shows the address that it opens, and opens it without access to the page", async () => {
  const { tab } = attached();
  const words = (url) => [url, "_blank", "noopener,noreferrer"];
  await tab.follow("https://host/a", "https://host/a");
  await tab.follow("https://host/", " https://host ");
  assert.deepEqual(page.opened.splice(0), [words("https://host/a"), words("https://host/")]);
  for (const shown of ["here", "https://bank/a", "https://host/"]) {
    void tab.follow("https://host/a", shown);
    assert.equal((await answer("open-link", "Cancel")).querySelector(".url").textContent, "https://host/a");
    assert.deepEqual(page.opened, []);
    void tab.follow("https://host/a", shown);
    await answer("open-link", "Open");
    assert.deepEqual(page.opened.splice(0), [words("https://host/a")]);
  }
});

test("the secret of a link is erased at once, and the rest of the address stays", () => {
  Object.assign(location, { hash: "#t=secret", search: "?renderer=dom" });
  assert.equal(takeFragment(), "#t=secret");
  assert.deepEqual(page.visited, [[null, "", "/?renderer=dom"]]);
  location.hash = "";
  assert.equal(takeFragment(), "");
  assert.equal(page.visited.length, 1);
});

// ---- full resets -----------------------------------------------------------------------------------------------

test("of many full resets only the last ones are done, and the screen is the same", async () => {
  const text = (piece) => new TextDecoder().decode(withoutManyResets(bytes(piece)));
  assert.equal(text("abc".repeat(9)), "abc".repeat(9));
  assert.equal(text("a\x1bc".repeat(7)), "a\x1bc".repeat(7));
  assert.equal(text(`${"a\x1bc".repeat(1_000)}end`), `\x1bc${"a\x1bc".repeat(7)}end`);
  const shown = async (make) => {
    const terminal = new Terminal({ allowProposedApi: true, cols: 20, rows: 3 });
    await new Promise((done) => terminal.write(make(bytes(flood)), done));
    const buffer = terminal.buffer.active;
    return [buffer.type, buffer.length, buffer.cursorX, buffer.getLine(0).translateToString(true), terminal.modes];
  };
  // Also where it begins inside another sequence, a string or a character.
  let flood;
  for (const begun of ["\x1b[?1049h\x1b[3", "\x1b]0;title", "\x1bP1$r", "\x1b[?1h\x1b(0\n\n\n\n", "\x1b", "\x1b#"]) {
    flood = `${begun}\x1bcx`.repeat(500);
    assert.ok(withoutManyResets(bytes(flood)).length < flood.length / 50);
    assert.deepEqual(await shown(withoutManyResets), await shown((all) => all), JSON.stringify(begun));
  }
});

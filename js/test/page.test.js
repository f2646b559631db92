/** The page's logic, and what its sources may not do. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { createContext, runInContext } from "node:vm";
import xterm from "@xterm/xterm";
import { build } from "esbuild";

const JS = dirname(dirname(fileURLToPath(import.meta.url)));
const SOURCES = join(JS, "page", "src");

async function load(name) {
  const made = await build({
    entryPoints: [join(SOURCES, `${name}.ts`)],
    bundle: true,
    write: false,
    format: "esm",
    platform: "node",
  });
  return import(`data:text/javascript;base64,${Buffer.from(made.outputFiles[0].contents).toString("base64")}`);
}

const input = await load("input");
const texts = await load("texts");
const grants = await load("grants");
const store = await load("store");
const find = await load("find");
const { parseLink, toHex } = { ...(await import("../dist/links.js")), ...(await import("../dist/bytes.js")) };
const { browserLabel } = await import("../dist/platform-browser.js");

const plain = { ctrl: false, alt: false };
const NODE = "ab".repeat(32);

function link(more = "") {
  const node = Buffer.from(NODE, "hex").toString("base64url");
  return `https://host:7222/#t=${Buffer.alloc(32, 7).toString("base64url")}&n=${node}${more}`;
}

test("keys of the row as xterm sends them", () => {
  assert.equal(input.keySequence("ArrowUp", plain, false), "\x1b[A");
  assert.equal(input.keySequence("ArrowUp", plain, true), "\x1bOA");
  assert.equal(input.keySequence("ArrowUp", { ctrl: true, alt: false }, true), "\x1b[1;5A");
  assert.equal(input.keySequence("Home", plain, false), "\x1b[H");
  assert.equal(input.keySequence("End", { ctrl: true, alt: true }, false), "\x1b[1;7F");
  assert.equal(input.keySequence("PageDown", plain, true), "\x1b[6~");
  assert.equal(input.keySequence("PageUp", { ctrl: false, alt: true }, true), "\x1b[5;3~");
  assert.equal(input.keySequence("Tab", plain, false), "\t");
  assert.equal(input.keySequence("Escape", { ctrl: false, alt: true }, false), "\x1b\x1b");
});

test("Ctrl and Alt that were tapped count for the next character", () => {
  const ctrl = { ctrl: true, alt: false };
  assert.equal(input.withModifiers("c", ctrl), "\x03");
  assert.equal(input.withModifiers("C", ctrl), "\x03");
  assert.equal(input.withModifiers("[", ctrl), "\x1b");
  assert.equal(input.withModifiers(" ", ctrl), "\x00");
  assert.equal(input.withModifiers("/", ctrl), "\x1f");
  assert.equal(input.withModifiers("4", ctrl), "\x1c");
  assert.equal(input.withModifiers("é", ctrl), "é");
  assert.equal(input.withModifiers("x", { ctrl: false, alt: true }), "\x1bx");
  assert.equal(input.withModifiers("x", { ctrl: true, alt: true }), "\x1b\x18");
  assert.equal(input.withModifiers("🙂x", { ctrl: false, alt: true }), "\x1b🙂x");
  assert.equal(input.withModifiers("\x1b[A", ctrl), "\x1b[A");
});

test("a paste is asked about when it has line ends or control characters", () => {
  assert.equal(input.pasteRisk("echo one\ttwo é"), null);
  assert.deepEqual(input.pasteRisk("rm -rf x\n"), { lines: 1, controls: false });
  assert.deepEqual(input.pasteRisk("a\r\nb\rc\n"), { lines: 3, controls: false });
  for (const bad of ["\x1b[201~", "\x03", "\x9b201~", "\x7f", "\x00"])
    assert.equal(input.pasteRisk(`a${bad}b`).controls, true);
  assert.equal(input.withoutControls("a\x1b\x9b\x7f\tb\nc"), "a\tb\nc");
  assert.equal(input.visible("a\x1b\x7f\x9b\r\nb"), "a␛␡\ufffd\nb");
});

test("nothing in a paste ends its brackets", () => {
  assert.equal(input.pasteBytes("a\r\nb\nc", false), "a\rb\rc");
  assert.equal(input.pasteBytes("a\nb", true), "\x1b[200~a\rb\x1b[201~");
  const bad = input.pasteBytes("x\x1b[201~y\x9b201~z", true);
  assert.equal(bad.indexOf("\x1b[201~"), bad.length - 6);
  assert.equal(bad.includes("\x9b"), false);
});

test("what a program writes to the clipboard", () => {
  assert.equal(input.clipboardText("c;aMOp"), "hé");
  assert.equal(input.clipboardText(";aGk="), "hi");
  for (const none of ["c;?", "c;/w==", "c", "", "c;a b", `c;${"A".repeat(2_000_000)}`])
    assert.equal(input.clipboardText(none), null);
});

test("words", () => {
  assert.equal(texts.duration(-5), "0 s");
  assert.equal(texts.duration(59_999), "59 s");
  assert.equal(texts.duration(60_000), "1 min");
  assert.equal(texts.duration(2 * 86_400_000), "2 d");
  assert.equal(texts.ago(100, 101_000), "now");
  assert.equal(texts.ago(100, 160_000), "1 min ago");
  assert.equal(texts.bytes(1), "1 byte");
  assert.equal(texts.bytes(3_000), "3 KiB");
  assert.equal(texts.bytes(3 * 1_048_576), "3.0 MiB");
  const state = { connecting: false, online: true, ms: 5_200, watching: false };
  assert.equal(texts.troubleText(state), "Reconnecting for 5 s; what you type is kept.");
  assert.equal(texts.troubleText({ ...state, online: false, watching: true }), "Offline for 5 s.");
  assert.equal(texts.troubleText({ ...state, connecting: true }), "Connecting for 5 s.");
  assert.equal(texts.endText({ status: 3, signal: null, reason: "" }), "Ended with status 3.");
  assert.equal(texts.endText({ status: null, signal: 9, reason: "" }), "Ended by signal 9.");
  assert.equal(texts.othersText(0), "");
  assert.equal(texts.othersText(2), "2 other devices");
});

test("what a browser is called", () => {
  for (const [agent, kind, label] of [
    ["Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "desktop", "Firefox on Linux, desktop"],
    ["Mozilla/5.0 (Linux; Android 15) Chrome/140.0 Mobile Safari/537.36", "phone", "Chrome on Android, phone"],
    ["Mozilla/5.0 (Windows NT 10.0) Chrome/140.0 Safari/537.36 Edg/140.0", "tablet", "Edge on Windows, tablet"],
    ["Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Version/18.0 Safari/605.1.15", "", "Safari on macOS"],
    ["something", "", "Browser"],
  ])
    assert.equal(browserLabel(agent, kind), label);
});

test("a link becomes a ticket, with the node's own word where it names no node", async () => {
  const parsed = parseLink(link("&m=watch&a=main"));
  const grant = await grants.grantOf(parsed, NODE, 5);
  assert.deepEqual([grant.node, grant.session, grant.agent, grant.mode, grant.added], [NODE, null, "main", "watch", 5]);
  await assert.rejects(grants.grantOf(parsed, "cd".repeat(32), 5), /another node/);
  const silent = parseLink(link().replace(/&n=.*/, ""));
  assert.equal((await grants.grantOf(silent, NODE, 5)).node, NODE);
  await assert.rejects(grants.grantOf(silent, null, 5), /does not name its node/);
  assert.equal(await grants.grantOf(parseLink("https://host/"), NODE, 5), null);
  const again = grants.fragmentLink("host:1", grants.fragmentOf(parsed));
  assert.deepEqual([again.ticket, toHex(again.node), again.agent, again.mode], [parsed.ticket, NODE, "main", "watch"]);
  const id = async (text) => (await grants.grantOf(parseLink(text), null, 5)).id;
  assert.equal(await id(link("&m=watch&a=main")), grant.id);
  assert.notEqual(await id(link("&a=main")), grant.id);
  // Another ticket is another grant, whatever it says it is for.
  const other = link("&m=watch&a=main").replace(/t=[^&]*/, `t=${Buffer.alloc(32, 8).toString("base64url")}`);
  assert.notEqual(await id(other), grant.id);
  assert.equal(grants.grantText(grant), "main (watch only)");
});

test("a link is found in what was pasted around it", () => {
  assert.equal(grants.pastedLink(`open ${link()} now`).host, "host");
  assert.equal(grants.pastedLink(`\n${link()}\n`).port, 7222);
  assert.throws(() => grants.pastedLink("hello"), /no address/);
});

test("damaged settings are as if there were none", () => {
  assert.deepEqual(store.loadSettings(null, true), {
    theme: "system",
    fontSize: 12,
    screenReader: false,
    keys: "auto",
  });
  assert.equal(store.loadSettings("{", false).fontSize, 14);
  assert.equal(store.loadSettings("null", false).theme, "system");
  assert.equal(store.loadSettings('{"fontSize":900,"theme":"pink","keys":3}', false).fontSize, 14);
  assert.deepEqual(store.loadSettings('{"fontSize":18,"theme":"dark","screenReader":true,"keys":"shown"}', false), {
    theme: "dark",
    fontSize: 18,
    screenReader: true,
    keys: "shown",
  });
});

test("search finds across wrapped lines and wide characters", () => {
  const row = (y, text, cells) => ({ y, text, cells: cells ?? Array.from({ length: text.length + 1 }, (_, at) => at) });
  assert.deepEqual(find.findAll([row(3, "abcdefghABCD")], "abc", 10, false), [
    { y: 3, x: 0, cells: 3 },
    { y: 3, x: 8, cells: 3 },
  ]);
  assert.deepEqual(find.findAll([row(3, "abcdefghABCD")], "ABC", 10, true), [{ y: 3, x: 8, cells: 3 }]);
  assert.deepEqual(find.findAll([row(0, "日本x", [0, 2, 4, 5])], "本x", 10, false), [{ y: 0, x: 2, cells: 3 }]);
  assert.deepEqual(find.findAll([row(4, "x".repeat(25))], "x".repeat(12), 10, false)[1], { y: 5, x: 2, cells: 12 });
  assert.deepEqual(find.findAll([row(0, "abc")], "", 10, false), []);
  assert.deepEqual(
    find.findAll([row(0, "İx i")], "i", 10, false).map(({ x }) => x),
    [3],
  );
});

test("a terminal answers what is live, and nothing of history", async () => {
  const { Answers } = await load("answers");
  const queries =
    "\x1b[c\x1b[>c\x1b[=c\x1b[5n\x1b[6n\x1b[?6n\x1b[4$p\x1b[?25$p\x1b[>q\x1b[18t\x1bP$qm\x1b\\\x1b[?1004h";
  const heard = async (live) => {
    const terminal = new xterm.Terminal({ allowProposedApi: true, cols: 80, rows: 24 });
    const [sent, clipboard] = [[], []];
    const answers = new Answers(terminal, (text) => clipboard.push(text));
    terminal.onData((data) => answers.silenced || sent.push(data));
    answers.live = live;
    await new Promise((resolve) => terminal.write(`${queries}\x1b]52;c;aGk=\x07\x1b]52;c;?\x07`, resolve));
    assert.equal(answers.silenced, false);
    terminal.input("x");
    return { sent, clipboard };
  };
  const live = await heard(true);
  assert.equal(live.sent.length, 9 + 1, JSON.stringify(live.sent));
  assert.deepEqual(live.clipboard, ["hi"]);
  assert.deepEqual(await heard(false), { sent: ["x"], clipboard: [] });
});

test("the built page is what the sources make", async () => {
  await promisify(execFile)(process.execPath, [join(JS, "page", "build.mjs"), "--check"]);
});

test("the service worker keeps the page's own files, byte for byte, and nothing else", async () => {
  const served = join(JS, "..", "src", "sterna", "web", "static");
  const [listeners, kept, waits, answered] = [{}, [], [], []];
  const Request = class {
    constructor(url, options) {
      Object.assign(this, { url, ...options });
    }
  };
  const cache = { addAll: async (requests) => void kept.push(...requests), match: async (path) => path };
  const globals = { Request, URL, location: { origin: "https://node" }, caches: { open: async () => cache } };
  globals.addEventListener = (name, listen) => (listeners[name] = listen);
  globals.skipWaiting = async () => undefined;
  runInContext(await readFile(join(served, "sw.js"), "utf8"), createContext(globals));
  listeners.install({ waitUntil: (what) => waits.push(what) });
  await Promise.all(waits);
  const names = (await readdir(served)).filter((name) => !["sw.js", "licenses.txt", "index.html"].includes(name));
  assert.deepEqual(kept.map(({ url }) => url).sort(), ["/", ...names.map((name) => `/${name}`)].sort());
  // A browser that gets other bytes than these keeps none of the files.
  for (const { url, integrity } of kept) {
    const content = await readFile(join(served, url === "/" ? "index.html" : url));
    assert.equal(integrity, `sha256-${createHash("sha256").update(content).digest("base64")}`, url);
  }
  for (const [method, url] of [
    ["GET", "https://node/node"],
    ["GET", "https://node/constructor"],
    ["POST", "https://node/"],
    ["GET", "https://other/page.js"],
  ])
    listeners.fetch({ request: { method, url }, respondWith: () => answered.push(url) });
  assert.deepEqual(answered, []);
  const request = { method: "GET", url: "https://node/page.js?x" };
  listeners.fetch({ request, respondWith: (what) => answered.push(what) });
  assert.deepEqual(await Promise.all(answered), ["/page.js"]);
});

test("what a node says is never made into markup", async () => {
  const forbidden =
    /innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|setHTML|\beval\(|new Function/;
  const names = (await readdir(SOURCES)).filter((name) => name.endsWith(".ts"));
  assert.ok(names.length > 15);
  assert.match("cell.innerHTML = name", forbidden);
  for (const name of names) assert.doesNotMatch(await readFile(join(SOURCES, name), "utf8"), forbidden, name);
  // Neither does xterm.js: this is all that is served.
  const served = await readFile(join(JS, "..", "src", "sterna", "web", "static", "page.js"), "utf8");
  assert.doesNotMatch(served, /insertAdjacentHTML|document\.write\(|createContextualFragment|DOMParser/);
  assert.doesNotMatch(served, /\.innerHTML\s*=|\.outerHTML\s*=/);
});

/**
 * Builds the page into src/sterna/web/static; with --check only compares it with what is there.
 *
 * xterm.js is bundled from its sources, not from its ready-made bundle: so both parts share what they have in common,
 * names that no outsider uses are shortened, three places that a strict Content-Security-Policy forbids are mended, and
 * what a program's output could hang the page with is bounded.
 */

import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const HERE = dirname(fileURLToPath(import.meta.url));
const JS = dirname(HERE);
const STATIC = join(JS, "..", "src", "sterna", "web", "static");
const XTERM = join(JS, "node_modules", "@xterm");
const TOTAL_MAX_BYTES = 520_000;

/** Where the packages' sources begin. */
const SOURCES = {
  "@xterm/xterm": "xterm/src/browser/public/Terminal.ts",
  "@xterm/addon-web-links": "addon-web-links/src/WebLinksAddon.ts",
  "@xterm/addon-webgl": "addon-webgl/src/WebglAddon.ts",
  "@xterm/addon-unicode-graphemes": "addon-unicode-graphemes/src/UnicodeGraphemesAddon.ts",
};

/** What a policy without 'unsafe-inline' refuses: a file, how often, what, and what takes its place. */
const MENDED = [
  ["browser/renderer/dom/DomRenderer.ts", 2, "createElement('style')", "createElement('sterna-style')"],
  ["browser/Viewport.ts", 1, "createElement('style')", "createElement('sterna-style')"],
  [
    "browser/renderer/dom/DomRendererRowFactory.ts",
    1,
    "element.setAttribute('style', `${element.getAttribute('style') || ''}${style};`);",
    "element.style.cssText += `${style};`;",
  ],
];

/**
 * What some bytes of output would make of a page that hangs, or grows without end: the same, and the same to be seen,
 * but bounded. What is more than a screen can show is not counted any further.
 */
const SCREEN = "Math.min(params.params[0] || 1, Math.max(this._bufferService.cols, this._bufferService.rows))";
const REPEATED = `
    const width = Math.max(1, UnicodeService.extractWidth(joinState));
    const perRow = Math.max(1, Math.floor(this._bufferService.cols / width));
    const wanted = params.params[0] || 1;
    const length = Math.min(wanted, (this._bufferService.rows + 1) * perRow + wanted % perRow);`;
// Lines are moved by all of the count at once: one by one, five bytes would take as long as a thousand letters.
const MOVED = `private _moveLines(first: number, last: number, count: number, up: boolean, attr: IAttributeData): void {
    const { lines } = this._activeBuffer;
    count = Math.min(count, last - first + 1);
    lines.splice(up ? first : last - count + 1, count);
    const blank = Array.from({ length: count }, () => this._activeBuffer.getBlankLine(attr));
    lines.splice(up ? last - count + 1 : first, 0, ...blank);
  }

  `;
const [TOP, BOTTOM] = ["scrollTop", "scrollBottom"].map(
  (edge) => `this._activeBuffer.ybase + this._activeBuffer.${edge}`,
);
const ERASED = "this._eraseAttrData()";

/** Within `while (param--) {…}`: lines between two are moved up or down, so that blank ones come in. */
function moved(first, last, up, attr) {
  const lines = "this._activeBuffer.lines.splice";
  const [remove, insert] = up ? [first, last] : [last, first];
  const from = `${lines}(${remove}, 1);\n      ${lines}(${insert}, 0, this._activeBuffer.getBlankLine(${attr}));`;
  const to = `this._moveLines(${first}, ${last}, param + 1, ${up}, ${attr});\n      param = 0;`;
  return ["common/InputHandler.ts", 1, from, to];
}

const CELL_MAX_CHARS = 64;
const LINKS_MAX = 10_000;
const LINK_MAX_CHARS = 4_096;
const LINK_MAX_LINES = 256;
const COLOURS_MAX = 1_024;
const STRING_MAX_CHARS = 2_000_000;
const TOO_MANY = `buffer.markers.length >= ${LINKS_MAX}`;
const NEW_LINK = "const marker = buffer.addMarker(";
const LINK_REFUSED = `if (${TOO_MANY} || data.uri.length + (data.id ?? '').length > ${LINK_MAX_CHARS}) return 0;`;
const CONTRASTS_MAX = 10_000;
const THEME_SOON = `private _changing = 0;
  private _changeSoon(): void {
    this._changing ||= requestAnimationFrame(() => {
      this._changing = 0;
      this._onChangeColors.fire(this.colors);
    });
  }
`;

const BOUNDED = [
  ["common/InputHandler.ts", 6, "let param = params.params[0] || 1;", `let param = ${SCREEN};`],
  ["common/InputHandler.ts", 1, "const length = params.params[0] || 1;", REPEATED],
  ["common/InputHandler.ts", 1, "public scrollUp(", `${MOVED}public scrollUp(`],
  moved("row", "scrollBottomAbsolute - 1", false, ERASED),
  moved("row", "j", true, ERASED),
  moved(TOP, BOTTOM, true, ERASED),
  moved(TOP, BOTTOM, false, "DEFAULT_ATTR_DATA"),
  [
    "common/InputHandler.ts",
    1,
    "const slots = data.split(';');\n    while (slots.length > 1)",
    `const slots = data.split(';', ${COLOURS_MAX});\n    while (slots.length > 1)`,
  ],
  [
    "common/buffer/BufferLine.ts",
    1,
    "this._combined[index] += stringFromCodePoint(codePoint);",
    `if (this._combined[index].length < ${CELL_MAX_CHARS}) this._combined[index] += stringFromCodePoint(codePoint);`,
  ],
  ["common/parser/Constants.ts", 1, "PAYLOAD_LIMIT = 10000000;", `PAYLOAD_LIMIT = ${STRING_MAX_CHARS};`],
  ["common/services/OscLinkService.ts", 2, NEW_LINK, `${LINK_REFUSED}\n    ${NEW_LINK}`],
  [
    "common/services/OscLinkService.ts",
    1,
    "if (entry.lines.every(e => e.line !== y)) {",
    `const { buffer } = this._bufferService;
    if (entry.lines.length >= ${LINK_MAX_LINES} || ${TOO_MANY}) return;
    if (entry.lines[entry.lines.length - 1]?.line !== y && entry.lines.every(e => e.line !== y)) {`,
  ],
  // Each colour that changed would make all styles anew: that is done once for a frame.
  ["browser/services/ThemeService.ts", 1, "public modifyColors(", `${THEME_SOON}\n  public modifyColors(`],
  [
    "browser/services/ThemeService.ts",
    1,
    "// Assume the change happened\n    this._onChangeColors.fire(this.colors);",
    "this._changeSoon();",
  ],
  [
    "browser/services/ThemeService.ts",
    1,
    "this._restoreColor(slot);\n    this._onChangeColors.fire(this.colors);",
    "this._restoreColor(slot);\n    this._changeSoon();",
  ],
  [
    "browser/ColorContrastCache.ts",
    1,
    "this._color.set(bg, fg, value);",
    `if (++this._kept > ${CONTRASTS_MAX}) this.clear();\n    this._color.set(bg, fg, value);`,
  ],
  ["browser/ColorContrastCache.ts", 1, "this._color.clear();", "this._kept = 0;\n    this._color.clear();"],
  ["browser/ColorContrastCache.ts", 1, "public setCss(", "private _kept = 0;\n\n  public setCss("],
  // What has no width of its own was measured in every frame, which lays the page out each time.
  [
    "browser/renderer/dom/WidthCache.ts",
    2,
    "if (width > 0) {",
    "if (width > 0 || this._container.offsetParent !== null) {",
  ],
];

/** Finds xterm.js's sources, and mends them. */
const xterm = {
  name: "xterm",
  setup({ onResolve, onLoad, onEnd }) {
    const mended = new Set();
    onResolve({ filter: /^@xterm\/[a-z-]+$/ }, ({ path, importer }) => {
      // The addons name the API's types only.
      if (!SOURCES[path]) throw new Error(`no source is known of ${path}, which ${importer} imports`);
      return { path: join(XTERM, SOURCES[path]), sideEffects: false };
    });
    onResolve({ filter: /^(browser|common|vs)\// }, ({ path }) => ({
      path: join(XTERM, "xterm/src", `${path}.ts`),
      sideEffects: false, // what nobody uses is left out
    }));
    onLoad({ filter: /\.ts$/ }, async ({ path }) => {
      let contents = await readFile(path, "utf8");
      const name = relative(join(XTERM, "xterm/src"), path).split(sep).join("/");
      for (const [file, count, from, to] of [...MENDED, ...BOUNDED]) {
        if (file !== name) continue;
        const parts = contents.split(from);
        if (parts.length !== count + 1) throw new Error(`${file} has no longer ${count} × ${from}`);
        contents = parts.join(to);
        mended.add(file);
      }
      const foreign = path.startsWith(XTERM);
      if (foreign && /createElement\(['"]style['"]\)/.test(contents) && !name.startsWith("vs/"))
        throw new Error(`${name} makes a style element`);
      return { contents, loader: "ts" };
    });
    onEnd(() => {
      for (const [file] of [...MENDED, ...BOUNDED])
        if (!mended.has(file)) throw new Error(`${file} is no longer part of xterm.js`);
    });
  },
};

const COMMON = { bundle: true, minify: true, write: false, target: "es2022", charset: "utf8", legalComments: "none" };

async function script(name, options) {
  const made = await build({ ...COMMON, entryPoints: [join(HERE, "src", name)], ...options });
  return made.outputFiles[0].text;
}

async function page() {
  return script("main.ts", {
    format: "esm",
    plugins: [xterm],
    mangleProps: /^_[a-zA-Z]/,
    tsconfigRaw: { compilerOptions: { experimentalDecorators: true, useDefineForClassFields: false } },
  });
}

async function styles() {
  const made = await build({
    ...COMMON,
    stdin: { contents: '@import "@xterm/xterm/css/xterm.css"; @import "./page.css";', resolveDir: HERE, loader: "css" },
  });
  return made.outputFiles[0].text;
}

/** The licences of what is in page.js. */
async function licenses() {
  const parts = ["This page contains the following software.\n"];
  const files = [];
  for (const name of Object.keys(SOURCES)) {
    const { version } = JSON.parse(await readFile(join(JS, "node_modules", name, "package.json"), "utf8"));
    files.push([`${name} ${version}`, await readFile(join(JS, "node_modules", name, "LICENSE"), "utf8")]);
  }
  files.push(["Parts of Visual Studio Code in @xterm/xterm", await readFile(join(HERE, "LICENSE.vscode"), "utf8")]);
  files.push([
    "Parts of unicode-properties, unicode-trie and tiny-inflate in @xterm/addon-unicode-graphemes",
    await readFile(join(HERE, "LICENSE.unicode"), "utf8"),
  ]);
  const alike = new Map();
  for (const [name, text] of files) alike.set(text.trim(), [...(alike.get(text.trim()) ?? []), name]);
  for (const [text, names] of alike) parts.push(`${"-".repeat(80)}\n${names.join("\n")}\n\n${text}\n`);
  return parts.join("\n");
}

async function files() {
  const made = new Map();
  for (const name of ["index.html", "manifest.webmanifest", "icon.svg", "icon-192.png", "icon-512.png"])
    made.set(name, await readFile(join(HERE, name)));
  made.set("page.css", Buffer.from(await styles()));
  made.set("page.js", Buffer.from(await page()));
  made.set("licenses.txt", Buffer.from(await licenses()));
  const hash = createHash("sha256");
  for (const [name, content] of made) hash.update(name).update(content);
  const shell = {};
  for (const [name, content] of made) {
    const digest = createHash("sha256").update(content).digest("base64");
    if (name !== "licenses.txt") shell[name === "index.html" ? "/" : `/${name}`] = `sha256-${digest}`;
  }
  const define = {
    SHELL: JSON.stringify(shell),
    VERSION: JSON.stringify(hash.digest("hex").slice(0, 16)),
  };
  made.set("sw.js", Buffer.from(await script("worker.ts", { format: "iife", define })));
  return made;
}

const made = await files();
const total = [...made.values()].reduce((sum, content) => sum + content.length, 0);
if (total > TOTAL_MAX_BYTES) throw new Error(`the page has ${total} bytes: more than ${TOTAL_MAX_BYTES}`);
if (process.argv.includes("--check")) {
  const there = new Set(await readdir(STATIC));
  const stale = [];
  for (const [name, content] of made) {
    const same = there.delete(name) && content.equals(await readFile(join(STATIC, name)));
    if (!same) stale.push(name);
  }
  stale.push(...there);
  if (stale.length) {
    console.error(`not what \`npm run page\` makes: ${stale.join(", ")}`);
    process.exit(1);
  }
} else {
  await mkdir(STATIC, { recursive: true });
  for (const name of await readdir(STATIC)) if (!made.has(name)) await rm(join(STATIC, name));
  for (const [name, content] of made) await writeFile(join(STATIC, name), content);
}
console.log(`${made.size} files, ${total} bytes`);

/**
 * Builds the page into src/sterna/web/static; with --check only compares it with what is there.
 *
 * xterm.js is bundled from its sources, not from its ready-made bundle: so both parts share what they have in common,
 * names that no outsider uses are shortened, and three places that a strict Content-Security-Policy forbids are mended.
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
const TOTAL_MAX_BYTES = 500_000;

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
      for (const [file, count, from, to] of MENDED) {
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
      for (const [file] of MENDED) if (!mended.has(file)) throw new Error(`${file} is no longer part of xterm.js`);
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
  const shell = [...made.keys()].filter((name) => name !== "licenses.txt");
  const define = {
    SHELL: JSON.stringify(shell.map((name) => (name === "index.html" ? "/" : `/${name}`))),
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

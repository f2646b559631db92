/** The terminal's colours, in light and in dark. */

import type { ITheme } from "@xterm/xterm";

const DARK: ITheme = {
  background: "#14171c",
  foreground: "#d7dbe2",
  cursor: "#e8ebf0",
  cursorAccent: "#14171c",
  selectionBackground: "#35507a",
  selectionInactiveBackground: "#2c3542",
  black: "#2a2f38",
  red: "#ec6a6f",
  green: "#7cc287",
  yellow: "#dfb467",
  blue: "#6fa8f0",
  magenta: "#c98be0",
  cyan: "#5fc2c9",
  white: "#c6ccd6",
  brightBlack: "#6f7886",
  brightRed: "#ff8d90",
  brightGreen: "#9ddca6",
  brightYellow: "#f2cd8b",
  brightBlue: "#94c1ff",
  brightMagenta: "#dcabee",
  brightCyan: "#8adce1",
  brightWhite: "#f4f6f9",
  scrollbarSliderBackground: "#ffffff22",
  scrollbarSliderHoverBackground: "#ffffff3c",
  scrollbarSliderActiveBackground: "#ffffff55",
};

const LIGHT: ITheme = {
  background: "#ffffff",
  foreground: "#1f2430",
  cursor: "#1f2430",
  cursorAccent: "#ffffff",
  selectionBackground: "#b9d3f8",
  selectionInactiveBackground: "#dde4ee",
  black: "#1f2430",
  red: "#b3262e",
  green: "#1f7a34",
  yellow: "#8a5a00",
  blue: "#1d5cb8",
  magenta: "#8b3aa8",
  cyan: "#0c6f78",
  white: "#8b93a1",
  brightBlack: "#5d6674",
  brightRed: "#cf3a40",
  brightGreen: "#2c8f45",
  brightYellow: "#9c6a08",
  brightBlue: "#2f72d6",
  brightMagenta: "#a34fc0",
  brightCyan: "#16838d",
  brightWhite: "#3c4452",
  scrollbarSliderBackground: "#00000022",
  scrollbarSliderHoverBackground: "#0000003c",
  scrollbarSliderActiveBackground: "#00000055",
};

/** Returns the colours of a terminal. */
export function terminalTheme(dark: boolean): ITheme {
  return dark ? DARK : LIGHT;
}

/** Returns the least contrast of text: programs that were made for dark terminals are readable on light ones, too. */
export function contrast(dark: boolean): number {
  if (matchMedia("(prefers-contrast: more)").matches || matchMedia("(forced-colors: active)").matches) return 7;
  return dark ? 1 : 4.5;
}

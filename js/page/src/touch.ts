/** Fingers on a terminal: one scrolls, two change the size of the text. */

import type { Terminal } from "@xterm/xterm";

const START_PX = 8;
const HELD_MS = 600;
const SLOWING = 0.94;
const SLOWEST_PX_MS = 0.05;

/** What fingers do beside scrolling. */
export interface Fingers {
  /** Two fingers were spread by this factor since they came; `done`: they are up. */
  spread(factor: number, done: boolean): void;
  /** One finger rested on the terminal. */
  held(): void;
}

/** Makes a terminal's host follow fingers. */
export function followFingers(host: HTMLElement, terminal: Terminal, tell: Fingers): void {
  const fingers = new Map<number, { x: number; y: number }>();
  let scrolling = false;
  let spread = 0;
  let rest = 0;
  let speed = 0;
  let stamp = 0;
  let frame = 0;
  let holding: ReturnType<typeof setTimeout> | undefined;

  const scroll = (pixels: number): void => {
    const height = host.querySelector(".xterm-screen")?.clientHeight ?? 0;
    const line = height / terminal.rows || 16;
    rest += pixels;
    const lines = Math.trunc(rest / line);
    if (!lines) return;
    rest -= lines * line;
    const { buffer, modes } = terminal;
    if (buffer.active.type === "normal" && modes.mouseTrackingMode === "none") terminal.scrollLines(-lines);
    else turnWheel(host, -lines);
  };
  const glide = (): void => {
    speed *= SLOWING;
    if (Math.abs(speed) < SLOWEST_PX_MS) return;
    scroll(speed * 16);
    frame = requestAnimationFrame(glide);
  };
  const distance = (): number => {
    const [a, b] = [...fingers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y);
  };

  host.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch") return;
    cancelAnimationFrame(frame);
    if (event.isPrimary) fingers.clear(); // a finger may be lifted where nobody sees it
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    scrolling = false;
    rest = speed = 0;
    stamp = event.timeStamp;
    clearTimeout(holding);
    if (fingers.size === 1) holding = setTimeout(() => tell.held(), HELD_MS);
    if (fingers.size === 2) spread = distance();
  });
  host.addEventListener("pointermove", (event) => {
    const finger = fingers.get(event.pointerId);
    if (finger === undefined) return;
    const moved = event.clientY - finger.y;
    if (fingers.size === 1) {
      if (!scrolling && Math.abs(moved) < START_PX) return;
      scrolling = true;
      clearTimeout(holding);
      const passed = Math.max(1, event.timeStamp - stamp);
      speed = 0.7 * (moved / passed) + 0.3 * speed;
      stamp = event.timeStamp;
      scroll(moved);
    }
    finger.x = event.clientX;
    finger.y = event.clientY;
    if (fingers.size === 2 && spread) tell.spread(distance() / spread, false);
  });
  const up = (event: PointerEvent): void => {
    if (!fingers.delete(event.pointerId)) return;
    clearTimeout(holding);
    if (spread && fingers.size < 2) {
      spread = 0;
      tell.spread(1, true);
    } else if (scrolling && !fingers.size && event.type === "pointerup") glide();
  };
  host.addEventListener("contextmenu", (event) => {
    if ((event as PointerEvent).pointerType === "touch") event.preventDefault();
  });
  host.addEventListener("pointerup", up);
  host.addEventListener("pointercancel", up);
}

/** Tells the program as a mouse wheel does, which xterm.js makes reports or arrow keys of. */
function turnWheel(host: HTMLElement, lines: number): void {
  const target = host.querySelector(".xterm-screen");
  if (target === null) return;
  const { left, top, width, height } = target.getBoundingClientRect();
  const where = { clientX: left + width / 2, clientY: top + height / 2 };
  for (let turn = 0; turn < Math.min(Math.abs(lines), 20); turn++) {
    const turned = { deltaY: Math.sign(lines), deltaMode: WheelEvent.DOM_DELTA_LINE, bubbles: true, cancelable: true };
    target.dispatchEvent(new WheelEvent("wheel", { ...turned, ...where }));
  }
}

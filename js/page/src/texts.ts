/** Words for people: durations, sizes, ends. */

/** Returns a duration in its largest unit: "5 s", "3 min", "2 h", "4 d". */
export function duration(ms: number): string {
  const seconds = Math.max(0, Math.floor(ms / 1_000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3_600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3_600)} h`;
  return `${Math.floor(seconds / 86_400)} d`;
}

/** Returns how long ago a time (seconds since 1970) was, for a list. */
export function ago(seconds: number, nowMs: number): string {
  const passed = nowMs - seconds * 1_000;
  return passed < 5_000 ? "now" : `${duration(passed)} ago`;
}

/** Returns a number of bytes. */
export function bytes(count: number): string {
  if (count < 1_024) return `${count} ${count === 1 ? "byte" : "bytes"}`;
  if (count < 1_024 * 1_024) return `${Math.round(count / 1_024)} KiB`;
  return `${(count / 1_048_576).toFixed(1)} MiB`;
}

/** Returns what is said while there is no connection: what, and since when. */
export function troubleText(state: { connecting: boolean; online: boolean; ms: number; watching: boolean }): string {
  const { connecting, online, ms, watching } = state;
  const what = online ? (connecting ? "Connecting" : "Reconnecting") : "Offline";
  return `${what} for ${duration(ms)}${connecting || watching ? "." : "; what you type is kept."}`;
}

/** Returns how a program ended. */
export function endText(end: { status: number | null; signal: number | null; reason: string }): string {
  if (end.signal !== null) return `Ended by signal ${end.signal}.`;
  if (end.status !== null) return `Ended with status ${end.status}.`;
  return end.reason ? `Ended: ${end.reason}` : "The session is over.";
}

/** What is said to a browser that was revoked. */
export const REVOKED = "This browser was revoked. Forget its key, then open a new link (sterna share) to get in again.";
export const FORGET_KEY = "Forget this browser\u2019s key";

/** Returns what is said of output that will never come. */
export function gapText(count: number): string {
  return `${bytes(count)} of output were not kept while this page was away; what you see is right again from here on.`;
}

/** Returns what is said of input of which nobody knows whether it arrived. */
export function uncertainText(count: number): string {
  return `The agent was lost: the last ${bytes(count)} that you typed may or may not have reached it, and are not repeated.`;
}

/** Returns who else is there, or "". */
export function othersText(count: number): string {
  return count <= 0 ? "" : count === 1 ? "1 other device" : `${count} other devices`;
}

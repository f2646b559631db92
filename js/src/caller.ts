/** Asks a node questions (CALL and RESULT) on a connection of its own, which ends when it is idle. */

import { ConnectionLostError, isFinal, type SternaError } from "./errors.js";
import { type DeviceKey, toSign } from "./device.js";
import { type Frame, Type } from "./frame.js";
import { CALL_IDLE_MS, CALL_MS } from "./limits.js";
import { Link } from "./link.js";
import { refusal, type Wish } from "./machine.js";
import { CONTEXT_CONNECT, ErrorMessage, pack, parse, parseShown, Result, shown } from "./messages.js";
import { random, type Target, type Wire } from "./platform.js";

interface Pending {
  method: string;
  params: object;
  resolve: (value: unknown) => void;
  reject: (error: SternaError) => void;
  timer: ReturnType<typeof setTimeout>;
}

/** Makes CALLs as one device, several at once if need be. */
export class Caller {
  private link = new Link();
  private wire: Wire | null = null;
  private proved = false;
  private ids = 0;
  private readonly pending = new Map<number, Pending>();
  private idle: ReturnType<typeof setTimeout> | undefined;
  private refused: SternaError | null = null;
  /** Called once when the node lets us in no more, whether or not something was asked; every later call fails so. */
  onrefused: ((error: SternaError) => void) | null = null;

  constructor(
    private readonly target: Target,
    private readonly key: DeviceKey,
    private readonly wish: Wish,
  ) {}

  /** Resolves with the value of one CALL; the node's refusal, and no answer within 10 s, are errors. */
  call(method: string, params: object): Promise<unknown> {
    if (this.refused !== null) return Promise.reject(this.refused);
    clearTimeout(this.idle);
    return new Promise((resolve, reject) => {
      const id = ++this.ids;
      const silent = new ConnectionLostError(
        `The node at ${this.target.name} did not answer within ${CALL_MS / 1_000} seconds.`,
      );
      const timer = setTimeout(() => this.settle(id, (one) => one.reject(silent)), CALL_MS);
      const one = { method, params, resolve, reject, timer };
      this.pending.set(id, one);
      if (this.wire === null) this.dial();
      else if (this.proved) this.ask(id, one);
    });
  }

  /** Ends the connection. */
  close(): void {
    this.drop(new ConnectionLostError("The session was left: nothing can be asked any more."));
  }

  /** The node ends the connection. */
  private end(error: SternaError): void {
    if (isFinal(error.code)) this.refused = error;
    this.drop(error);
    if (this.refused !== null) this.onrefused?.(error);
  }

  private drop(error: SternaError): void {
    clearTimeout(this.idle);
    this.wire?.close();
    this.wire = null;
    this.proved = false;
    for (const id of [...this.pending.keys()]) this.settle(id, (one) => one.reject(error));
  }

  private settle(id: number, how: (one: Pending) => void): void {
    const one = this.pending.get(id);
    if (one === undefined) return;
    this.pending.delete(id);
    clearTimeout(one.timer);
    how(one);
    if (!this.pending.size && this.wire !== null) {
      this.idle = setTimeout(() => this.close(), CALL_IDLE_MS);
      (this.idle as { unref?: () => void }).unref?.();
    }
  }

  private dial(): void {
    const link = new Link();
    this.link = link;
    const mine = (what: () => void) => (): void => {
      if (this.link === link) what();
    };
    this.wire = this.target.dial({
      reached: () => undefined,
      open: mine(() => void this.prove(link)),
      data: (data) => mine(() => this.receive(data))(),
      failed: (error) => mine(() => this.drop(error))(),
      ended: mine(() =>
        this.drop(new ConnectionLostError(`The node at ${this.target.name} ended the connection; try again.`)),
      ),
    });
  }

  private async prove(link: Link): Promise<void> {
    const { credential, label, mode } = this.wish;
    const body = pack({
      context: CONTEXT_CONNECT,
      node: this.target.node,
      request: random(16),
      key: this.key.public,
      attachment: random(16),
      credential,
      want: "call",
      label,
      mode,
    });
    try {
      const sig = await this.key.sign(toSign(CONTEXT_CONNECT, this.target.node, body));
      if (this.link !== link) return;
      link.sendMessage(Type.CONNECT, 1, { body, sig });
      this.flush();
    } catch (error) {
      this.drop(error as SternaError);
    }
  }

  private ask(id: number, { method, params }: Pending): void {
    this.link.sendMessage(Type.CALL, 0, { id, method, params });
    this.flush();
  }

  private receive(data: Uint8Array): void {
    try {
      for (const frame of this.link.receive(data)) this.frame(frame);
      this.link.check();
      if (this.link.closing) this.drop(new ConnectionLostError("What the node says makes no sense."));
      else this.flush();
    } catch (error) {
      this.drop(error as SternaError);
    }
  }

  private frame({ type, payload }: Frame): void {
    if (type === Type.PING) this.link.send(Type.PONG, 0, 0, payload);
    else if (type === Type.ERROR) this.end(refusal(parseShown(ErrorMessage, payload)));
    else if (type === Type.ACCEPT) {
      this.proved = true;
      for (const [id, one] of this.pending) this.ask(id, one);
    } else if (type === Type.RESULT) {
      const result = parse(Result, payload);
      this.settle(result.id, (one) => {
        if (result.error === null) one.resolve(shown(result.value));
        else one.reject(refusal(shown(result.error)));
      });
    }
  }

  private flush(): void {
    const frames = this.link.dataToSend();
    if (frames.length) this.wire?.send(frames);
  }
}

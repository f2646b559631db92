"""The remote daemon's loop: what wakes it."""

from __future__ import annotations

import signal
import threading
import time

from sterna.remote.loop import Loop


def test_a_signal_wakes_the_loop_though_it_does_not_interrupt_its_wait() -> None:
    """As one does not that comes right before the wait begins, or in another thread, which can be had at will."""
    loop, waits, late = Loop(print), threading.Event(), []

    def give_up() -> None:
        late.append(True)
        loop.stop()

    def send() -> None:
        waits.wait(10)
        time.sleep(0.05)  # the wait has begun by then; if it has not, this test is easier than it should be
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        loop.when_signalled((signal.SIGUSR1,), loop.stop)
        loop.later(0, waits.set)
        loop.later(3, give_up)
        loop.run()
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, before)
        sender.join()
    assert not late


def test_more_calls_than_the_bell_can_count() -> None:
    loop, count = Loop(print), 0

    def add() -> None:
        nonlocal count
        count += 1
        if count == 70_000:
            loop.stop()

    for _ in range(70_000):
        loop.post(add)
    loop.run()
    assert count == 70_000

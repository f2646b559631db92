"""Drives the world of sessions by a seeded generator: one number reproduces a run."""

from __future__ import annotations

import random

from sterna.protocol.frame import Type
from sterna.protocol.messages import Mode
from tests.simulation.session_client import Client
from tests.simulation.session_parts import Config
from tests.simulation.session_world import World

KINDS: tuple[tuple[bool, Mode], ...] = ((True, "drive"), (False, "drive"), (False, "watch"))
"""Whether exact, and the mode, of each client: a pipe, a terminal, a watcher."""


def run(seed: int, config: Config, *, steps: int = 300, exits: bool = False) -> World:
    """Takes `steps` random steps, lets the world heal, and checks that everything arrived; raises ViolationError."""
    rng = random.Random(seed)
    world = World(config, KINDS)
    world.pod_connect()
    world.deliver_pod(1 << 30, 1 << 30)
    frozen = rng.choice((None, *world.clients))
    for number in range(steps):
        step(world, rng, frozen if number > steps // 4 else None)
    if exits and rng.random() < 0.5:
        world.act(world.pod.exit)
        for _ in range(steps // 4):
            step(world, rng)
    world.settle()
    return world


def size(rng: random.Random, config: Config) -> int:
    """Mostly small, now and then more than a window."""
    most = max(config.window, config.pod_window)
    return rng.choice((1, 10, 100, 1000, most // 3, most, 3 * most))


def step(world: World, rng: random.Random, frozen: Client | None = None) -> None:
    """Takes one random step; a frozen client takes none, it just holds its connection."""
    client = rng.choice([client for client in world.clients if client is not frozen])
    many = size(rng, world.config)
    choice = rng.random()
    if choice < 0.30:
        world.deliver(client, rng.choice((0, 7, many, 1 << 30)), rng.choice((0, 7, many, 1 << 30)))
    elif choice < 0.50:
        world.deliver_pod(rng.choice((0, 7, many, 1 << 30)), rng.choice((0, 7, many, 1 << 30)))
    elif choice < 0.60:
        world.act(lambda: world.pod.write(many))
    elif choice < 0.71:
        world.act(lambda: user(client, rng, many))
    elif choice < 0.77:
        world.act(lambda: client.handle_output(many))
    elif choice < 0.80:
        world.act(lambda: world.pod.handle_input(rng.randrange(1, 3)))
    elif choice < 0.84:
        world.act(world.pod.answer_capture)
    elif choice < 0.91:
        world.tick(rng.choice((1, 60, 120, 260, 260, 11_000)))
    else:
        disturb(world, client, rng, many)


def user(client: Client, rng: random.Random, many: int) -> None:
    """A user types, or sends a signal or the end of input."""
    if client.mode != "drive":
        return
    if rng.random() < 0.8:
        client.type(many)
    else:
        client.mark(rng.choice((Type.SIGNAL, Type.EOF)))


def disturb(world: World, client: Client, rng: random.Random, many: int) -> None:
    """Something breaks, or somebody comes or goes."""
    choice = rng.random()
    if choice < 0.35:
        world.connect(client)
    elif choice < 0.50:
        world.cut(client)
    elif choice < 0.58:
        world.leave(client)
    elif choice < 0.70:
        world.notice_old(rng.randrange(8), rng.choice((0, many)))
    elif choice < 0.78:
        world.pod_cut(rng.choice((0, many)))
    elif choice < 0.90:
        world.pod_connect()
    elif choice < 0.96:
        world.pod_notice()
    else:
        world.node_restart()

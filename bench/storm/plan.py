"""What a storm breaks, drawn from a seed: which processes, how, and how long after the last loss. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from afd.types import Topology

ALIASES = {"both": "attention+ffn"}
DELAY_S = (0.3, 2.0)


@dataclass(frozen=True, slots=True)
class Loss:
    """Processes that are lost in the same instant.

    targets: such as "attention/1", "ffn/0", "coordinator".
    how: "kill"; "stop": they stand still for `hold_s` and go on (SIGSTOP, SIGCONT); "keep": they are killed, and so is
    every successor within `hold_s`.
    delay_s: until then, from the moment at which the cluster was whole again after the last loss.
    hasty: it does not wait for that moment: `delay_s` counts from the last loss itself.
    """

    targets: tuple[str, ...]
    how: str = "kill"
    hold_s: float = 0.0
    delay_s: float = 0.0
    hasty: bool = False

    @property
    def roles(self) -> list[str]:
        return [target.partition("/")[0] for target in self.targets]

    @property
    def kind(self) -> str:
        """What the losses of one line of the table have in common: "attention + ffn killed"."""
        how = {"kill": "killed", "stop": f"stopped {self.hold_s:g} s", "keep": f"gone for {self.hold_s:g} s"}[self.how]
        return f"{' + '.join(self.roles)} {how}{' in haste' if self.hasty else ''}"


def draw_losses(
    topology: Topology,
    num_losses: int,
    seed: int,
    roles: Sequence[str] = ("attention",),
    hows: Sequence[str] = ("kill",),
    haste: float = 0.0,
    delay_s: tuple[float, float] = DELAY_S,
) -> list[Loss]:
    """The same losses for the same arguments, each kind about as often as the others.

    roles: of the processes lost together: "ffn", "attention+attention", "both" (attention+ffn), "attention/0".
    hows: "kill", "stop:SECONDS" or "keep:SECONDS", which kills successors too.
    haste: share of the losses that do not wait until the cluster is whole.
    ValueError where the topology has no such processes, or a word is none of these.
    """
    rng = random.Random(f"{topology} {seed}")
    kinds = [(_split(role, topology), *_how(how)) for role in roles for how in hows]
    losses = []
    for _ in range(num_losses):
        words, how, hold_s = rng.choice(kinds)
        after_s, hasty = round(rng.uniform(*delay_s), 3), rng.random() < haste
        losses.append(Loss(_targets(rng, words, topology), how, hold_s, after_s, hasty))
    return losses


def _targets(rng: random.Random, words: list[str], topology: Topology) -> tuple[str, ...]:
    """words: roles, or processes by name."""
    targets = [word for word in words if "/" in word]
    for role, num in Counter(word for word in words if "/" not in word).items():
        places = [name for name in _processes(role, topology) if name not in targets]
        targets += sorted(rng.sample(places, num))
    return tuple(targets)


def _processes(role: str, topology: Topology) -> list[str]:
    num = {"attention": topology.num_attention, "ffn": topology.num_ffn}.get(role, 0)
    return ["coordinator"] if role == "coordinator" else [f"{role}/{rank}" for rank in range(num)]


def _split(text: str, topology: Topology) -> list[str]:
    words = ALIASES.get(text, text).split("+")
    for role, num in Counter(word.partition("/")[0] for word in words).items():
        places = _processes(role, topology)
        named = [word for word in words if "/" in word and word.startswith(role)]
        if num > len(places) or len(set(named) & set(places)) < len(named):
            raise ValueError(f"{text!r}: {topology} has {', '.join(places) or 'no process'} of role {role!r}")
    return words


def _how(text: str) -> tuple[str, float]:
    how, _, seconds = text.partition(":")
    if text == "kill":
        return how, 0.0
    try:
        hold_s = float(seconds) if how in ("stop", "keep") else 0.0
    except ValueError:
        hold_s = 0.0
    if not 0 < hold_s < 3600:
        raise ValueError(f'{text!r} is none of "kill", "stop:SECONDS", "keep:SECONDS"')
    return how, hold_s

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
    hold_s: they stand still for so long and go on (SIGSTOP, SIGCONT); 0 = they are killed.
    delay_s: until then, from the moment at which the cluster was whole again after the last loss.
    hasty: it does not wait for that moment: `delay_s` counts from the last loss itself.
    """

    targets: tuple[str, ...]
    hold_s: float = 0.0
    delay_s: float = 0.0
    hasty: bool = False

    @property
    def roles(self) -> list[str]:
        return [target.partition("/")[0] for target in self.targets]

    @property
    def kind(self) -> str:
        """What the losses of one line of the table have in common: "attention + ffn killed"."""
        how = f"stopped {self.hold_s:g} s" if self.hold_s else "killed"
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

    roles: of the processes lost together: "ffn", "attention+attention", "both" (attention+ffn).
    hows: "kill", or "stop:SECONDS".
    haste: share of the losses that do not wait until the cluster is whole.
    ValueError where the topology has no such processes, or a word is none of these.
    """
    rng = random.Random(f"{topology} {seed}")
    kinds = [(_split(role, topology), _hold_s(how)) for role in roles for how in hows]
    return [_draw(rng, *rng.choice(kinds), topology, haste, delay_s) for _ in range(num_losses)]


def _draw(
    rng: random.Random,
    roles: list[str],
    hold_s: float,
    topology: Topology,
    haste: float,
    delay_s: tuple[float, float],
) -> Loss:
    targets = []
    for role, num in Counter(roles).items():
        ranks = rng.sample(range(_num_of(role, topology)), num)
        targets += [f"{role}/{rank}" if role in ("attention", "ffn") else role for rank in sorted(ranks)]
    return Loss(tuple(targets), hold_s, round(rng.uniform(*delay_s), 3), rng.random() < haste)


def _num_of(role: str, topology: Topology) -> int:
    return {"attention": topology.num_attention, "ffn": topology.num_ffn, "coordinator": 1, "gateway": 1}.get(role, 0)


def _split(text: str, topology: Topology) -> list[str]:
    roles = ALIASES.get(text, text).split("+")
    for role, num in Counter(roles).items():
        if num > _num_of(role, topology):
            raise ValueError(f"{text!r}: {topology} has {_num_of(role, topology)} processes of role {role!r}")
    return roles


def _hold_s(text: str) -> float:
    how, _, seconds = text.partition(":")
    if how == "kill" and not seconds:
        return 0.0
    try:
        hold_s = float(seconds) if how == "stop" else 0.0
    except ValueError:
        hold_s = 0.0
    if not 0 < hold_s < 3600:
        raise ValueError(f'{text!r} is neither "kill" nor "stop:SECONDS"')
    return hold_s

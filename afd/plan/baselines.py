"""What the same chips do without AFD: expert and tensor parallel deployments, with pipeline stages, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from afd.plan.colocated import Colocated, ColocatedModel, server_sizes, stage_counts
from afd.plan.deployment import Deployment
from afd.plan.estimate import Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.search import SearchSpace
from afd.plan.tensor_parallel import TensorParallelModel
from afd.types import Topology


def colocated_on(space: SearchSpace, estimator: Estimator, objective: Objective, chip: Chip) -> list[Colocated]:
    """The best of each kind of layout on one kind of chip, the fastest per chip first; those that hold the SLA."""
    kinds = _by_kind(space, estimator, objective, chip)
    best = [max(found, key=lambda c: (c.tgs, -c.num_chips)) for found in kinds if found]
    return sorted(best, key=lambda c: -c.tgs)


def layouts_on(space: SearchSpace, estimator: Estimator, objective: Objective, chip: Chip) -> list[Colocated]:
    """Every size of every kind of layout that holds the SLA, each at its best batch."""
    expert, tensor = _by_kind(space, estimator, objective, chip)
    return [*expert, *tensor]


def _by_kind(
    space: SearchSpace, estimator: Estimator, objective: Objective, chip: Chip
) -> tuple[list[Colocated], list[Colocated]]:
    """The best expert parallel deployment of each size and number of stages, and the tensor parallel ones."""
    template, limit, efficiency = server_template(space, chip), space.limit(chip), estimator.efficiency
    ranks = template.ranks_per_instance
    expert, tensor = [], []
    for stages in stage_counts(ranks, limit):
        model = ColocatedModel(template, efficiency, stages, objective.requests)
        expert += [model.best(objective, [size]) for size in server_sizes(ranks, limit // stages)]
        tensor.append(TensorParallelModel(template, efficiency, stages, objective.requests).best(objective))
    return [c for c in expert if c is not None], [c for c in tensor if c is not None]


def server_template(space: SearchSpace, chip: Chip) -> Deployment:
    """Whole servers, however many ranks an instance of AFD has."""
    servers = dataclasses.replace(space, ranks_per_instance=min(chip.chips_per_server, space.limit(chip)))
    return servers.deployment(chip, chip, Topology(1, 1), streams=1)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Every chip of an inventory in the best colocated deployment of its kind, as many copies as fit.

    parts: (deployment, copies).
    """

    parts: tuple[tuple[Colocated, int], ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(copies * c.num_chips * c.tgs for c, copies in self.parts)

    @property
    def text(self) -> str:
        """ "4 x EP8 on H20 and 1 x TP8 on H800"."""
        return " and ".join(f"{copies} x {c.layout} on {c.chip.title}" for c, copies in self.parts)


def side_by_side(space: SearchSpace, estimator: Estimator, objective: Objective) -> SideBySide | None:
    """All chips of the inventory without AFD; None without an inventory, or when no kind of them holds the SLA."""
    parts = []
    for chip in space.chips if space.inventory else ():
        every = layouts_on(space, estimator, objective, chip)  # of every size: whole copies fill the inventory
        whole = [(c, space.limit(chip) // c.num_chips) for c in every]
        if whole:
            parts.append(max(whole, key=lambda part: part[1] * part[0].num_chips * part[0].tgs))
    return SideBySide(tuple(parts)) if parts else None

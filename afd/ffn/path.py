"""How a gang's batch is computed and answered: the seam between the FFN worker's loop and who does the work.

The loop takes events and decides with `GangTable` what is computed next; a path does it in **legs**: one batch
(`python_path`), batch after batch of one step in native code (`relay_path`), or a batch that a GPU computes beside this
thread (`gpu_path`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from afd.ffn.gang import GangBatch


class Lap(NamedTuple):
    """One batch of a leg, in seconds of the engine's clock."""

    begun_s: float
    computed_s: float
    answered_s: float


class Leg(NamedTuple):
    """Batches of one gang, one a layer, that were computed and answered in one go.

    Numbers only: what traces keep must not keep the memory that dispatches lie in.
    """

    stream: int
    first_layer: int
    num_layers: int
    """Layers of the leg; 0 where a path waited for a step that did not come."""
    num_tokens: int
    """Rows of each batch."""
    num_members: int
    gang_id: int
    epoch: int
    began_s: float
    ended_s: float
    compute_s: float
    answer_s: float
    """Writing the answers."""
    wait_s: float
    """Waiting for dispatches between began_s and ended_s."""
    laps: Callable[[], Iterable[Lap]]
    """Each batch by itself, in order; only traces ask, and they may ask from any thread."""
    gathered_s: float | None = None
    """When the first member of the first batch came; None = the leg awaited it itself."""


class BatchPath(Protocol):
    """Called from the worker's main thread only, which holds torch.inference_mode()."""

    @property
    def computing(self) -> bool:
        """Batches are computed beside this thread: `finished` wants to be asked soon."""

    def run(self, batch: GangBatch) -> Leg | None:
        """Compute a batch and answer its members. None: launched, `finished` will have the leg."""

    def go_on(self) -> Leg | None:
        """Further batches, for whose dispatches the path looks by itself; None where it did not even look.

        Asked behind each `run`, and whenever no batch is complete.
        """

    def finished(self) -> list[Leg]:
        """Launched batches that were computed meanwhile, and are answered."""

"""How a step gets through the layers: the seam between the engine, which decides what runs, and who computes and sends.

The engine drives a step in **legs**. A leg is what a path does in one go: one layer and its dispatch (`python_path`),
many layers with the exchanges between them (`relay_path`), or a layer that a GPU computes beside this thread
(`gpu_path`). A path knows no scheduler, no request and no token that was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from afd.attention.exchange import NO_GANG, Combined, Gang
from afd.model.halves import AttentionBatch
from afd.sched.sequence import MicroBatch


@dataclass(slots=True)
class Step:
    """One micro-batch on its way through the layers."""

    micro_batch: MicroBatch
    batch: AttentionBatch
    started_s: float
    layer: int = -1
    """The newest layer that was dispatched; -1 = none yet."""
    x: Tensor = field(init=False, repr=False)
    """Residual [num_tokens, hidden], set by the path's `begin`: untouched between a dispatch and the leg that adds its
    answer.
    """
    alone: bool = False
    """No other step is in flight, so a leg may take as long as it likes: nobody waits for this thread."""
    sent_s: float = 0.0
    """When the newest dispatch left."""

    @property
    def stream(self) -> int:
        return self.micro_batch.stream


class Lap(NamedTuple):
    """One layer of a leg, in seconds of the engine's clock."""

    begun_s: float | None
    """Its embedding or combine began; None = that was part of the attention."""
    entered_s: float
    """Attention began."""
    computed_s: float
    """Its rows were ready to be sent."""
    posted_s: float
    answered_s: float | None
    """The answer was seen; None = not within the leg."""


class Spans(NamedTuple):
    """Where the time of a leg went. Numbers only: what traces keep must not keep the memory that answers lie in."""

    began_s: float
    ended_s: float
    """The last dispatch was posted, or its answer seen."""
    attention_s: float
    """Computing and posting here."""
    num_layers: int
    laps: Callable[[], Iterable[Lap]]
    """Each layer by itself, in order; only traces ask, and they may ask from any thread."""
    num_answered: int = 0
    """Layers whose answer was awaited within the leg: all of them, or all but the last."""
    wait_s: float = 0.0
    """Waiting for those answers."""
    ffn_s: float = 0.0
    """The FFN side's computing of them, as the answers tell it."""
    exposed_s: float = 0.0
    """The part of wait_s in which no FFN worker computed for this one."""
    open_wait_s: float = 0.0
    """Waiting behind ended_s for an answer that did not come."""
    gang: Gang = NO_GANG
    """Who was computed together with the layers that were answered."""
    typical: bool = True
    """False where the step takes a time that later ones will not, so that no model may learn from it."""


class Leg(NamedTuple):
    """What a path has done of one step in one go. answer: of its last layer, if that is here; None = still to come."""

    stream: int
    first_layer: int
    spans: Spans
    answer: Combined | None = None

    @property
    def last_layer(self) -> int:
        return self.first_layer + self.spans.num_layers - 1


class Fetch(Protocol):
    """Results on their way to host memory."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The results in host memory, to be read once `done`."""

    @property
    def device_s(self) -> float:
        """Seconds from the beginning of what was launched to the end of the copies. Known once `done`."""

    def done(self) -> bool:
        """Whether the results are here: a look."""


class LayerPath(Protocol):
    """Called from the worker's main thread only, which holds torch.inference_mode().

    PeerLostError out of any call: an FFN rank was lost. Nothing of the steps in flight may be booked; call `cancel`.
    """

    launches: bool
    """Layers and heads are only launched by the calls, and computed beside this thread."""

    @property
    def ready(self) -> bool:
        """True when every FFN rank of the epoch can be reached: only then may a step begin."""

    def stage(self, stream: int) -> AbstractContextManager[None]:
        """All computing for a stream, the paths' own apart, happens within this."""

    def begin(self, step: Step, token_ids: Sequence[int]) -> Leg | None:
        """Embed the step's tokens and go through its first layers. None: launched, `finished` will have the leg."""

    def resume(self, step: Step, answer: Combined) -> Leg | None:
        """Add the answer to the newest dispatch and go on with the layer behind it. None: launched, as of `begin`."""

    def end(self, step: Step, answer: Combined) -> None:
        """Add the answer of the last layer: step.x is complete."""

    def fetch(self, stream: int, results: Sequence[Tensor]) -> Fetch | None:
        """Bring results of the stream's head to the host; None: they are there."""

    def poll(self, timeout_s: float) -> list[Combined]:
        """Answers in the order of their completion; returns early on any event."""

    def finished(self) -> list[Leg]:
        """Launched legs that `poll` has found computed, and sent. Empty unless the path `launches`."""

    def has_news(self) -> bool:
        """Whether `poll` would not have to wait: a look, which costs less than `poll` does."""

    def idle(self, stream: int) -> None:
        """Tell the FFN ranks that this stream has nothing to run."""

    def cancel(self) -> None:
        """Forget all that is in flight. Nothing of it writes to memory any more, and late answers are dropped."""

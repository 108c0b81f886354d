"""The end of a micro-batch's step: from its last residual rows to what the next tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from afd.kernels import RowMax
from afd.model.halves import AttentionHalf
from afd.model.sampling import SampledBatch, Sampler, takes_largest
from afd.sched.sequence import Sequence


def keeps_logits(seqs: Seq[Sequence]) -> bool:
    """False where all of them take their largest logit as it is: then no other needs to be written down."""
    return not all(takes_largest(seq.sampling, seq.num_output) for seq in seqs)


@dataclass(slots=True)
class Head:
    """The vocabulary, slice by slice, for the sequences that sample; the first `done` entries of it are there.

    rows: [num_seqs, hidden], normed.
    logits: [num_seqs, vocab] float32, room for them; None unless `keeps_logits`.  best: of those so far, without them.
    """

    seqs: list[Sequence]
    rows: Tensor
    logits: Tensor | None
    best: RowMax = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.best = RowMax.of_nothing(len(self.seqs), self.rows.device)

    def advance(self, half: AttentionHalf, stop: int) -> None:
        """The vocabulary's entries up to `stop`."""
        if self.logits is not None:
            half.head_slice(self.rows, self.logits, self.done, stop)
        else:
            half.head_slice_max(self.rows, self.best, self.done, stop)
        self.done = stop

    @property
    def results(self) -> tuple[Tensor, ...]:
        """What `sample` looks at, where it was computed."""
        return self.best if self.logits is None else (self.logits,)

    @results.setter
    def results(self, tensors: Seq[Tensor]) -> None:
        if self.logits is not None:
            [self.logits] = tensors
        else:
            self.best = RowMax(*tensors)

    def sample(self, sampler: Sampler) -> SampledBatch:
        """The next token of every sequence."""
        if self.logits is None:
            return sampler.largest(self.best)
        needs_history = any(seq.sampling.needs_history for seq in self.seqs)
        return sampler.sample(
            self.logits,
            [seq.sampling for seq in self.seqs],
            [seq.num_output for seq in self.seqs],
            [(seq.prompt_ids(), seq.output_ids()) for seq in self.seqs] if needs_history else None,
        )

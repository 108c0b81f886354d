"""The end of a micro-batch's step: from its last residual rows to what the next tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from afd.model.halves import AttentionHalf
from afd.model.sampling import SampledBatch, Sampler, takes_largest
from afd.ops.ops import RowMax
from afd.sched.sequence import Sequence


def keeps_logits(seqs: Seq[Sequence]) -> bool:
    """False where all of them take their largest logit as it is: then no other needs to be written down."""
    return not all(takes_largest(seq.sampling, seq.num_output) for seq in seqs)


@dataclass(slots=True)
class Head:
    """The vocabulary, slice by slice, for the sequences that sample; the first `done` entries of it are there.

    rows: [num_seqs, hidden], normed.
    found: where `keeps_logits` room for the logits [num_seqs, vocab] float32; else the largest of those so far.
    """

    seqs: list[Sequence]
    rows: Tensor
    found: Tensor | RowMax
    done: int = 0

    def advance(self, half: AttentionHalf, stop: int) -> None:
        """The vocabulary's entries up to `stop`."""
        if isinstance(self.found, RowMax):
            half.head_slice_max(self.rows, self.found, self.done, stop)
        else:
            half.head_slice(self.rows, self.found, self.done, stop)
        self.done = stop

    @property
    def results(self) -> tuple[Tensor, ...]:
        """What `sample` looks at, in the memory of the device that computed it."""
        return self.found if isinstance(self.found, RowMax) else (self.found,)

    def sample(self, sampler: Sampler, results: Seq[Tensor]) -> SampledBatch:
        """The next token of every sequence. results: `results`, or copies of them on the host."""
        if isinstance(self.found, RowMax):
            return sampler.largest(RowMax(*results))
        needs_history = any(seq.sampling.needs_history for seq in self.seqs)
        [logits] = results
        return sampler.sample(
            logits,
            [seq.sampling for seq in self.seqs],
            [seq.num_output for seq in self.seqs],
            [(seq.prompt_ids(), seq.output_ids()) for seq in self.seqs] if needs_history else None,
        )

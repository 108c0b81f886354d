"""Stage times of the micro-batches that a simulation makes, from a StageModel of the planner.

A stage model prices one layer for `num_tokens` decodes of one context on each rank, and prefill beside them. Here a
worker stands for an instance of `ranks_per_instance` ranks that share its rows evenly, and its decodes have their mean
context. Sizes are rounded to seven significant bits (0.8 %), those of prefill to five (3 %), and prices remembered,
since a model costs more than a simulated step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.stages import Prefill, StageModel, StageTimes
from afd.sched.latency import StepLoad, attended
from afd.sched.sequence import BatchItem
from afd.simulate.fabric import Fabric
from afd.types import Topology

_NO_FABRIC = Fabric(0.0, 0.0)
_BITS, _PREFILL_BITS = 7, 5
_MAX_MIXED = 20_000  # prices of steps with prefill that are remembered
_MAX_AS_ASKED = 8_192  # transfers, by exact sizes: most are asked for again at once


@dataclass(frozen=True, slots=True)
class ConstantStages:
    """StageModel whose times depend on nothing: what closed formulas assume."""

    stage: StageTimes
    jitter: float = 0.0

    def times(
        self, deployment: Deployment, context: int, num_tokens: float, prefill: Prefill | None = None
    ) -> StageTimes:
        return self.stage

    @classmethod
    def parse(cls, text: str) -> ConstantStages:
        """ "attention_us=250,ffn_us=200,to_ffn_us=40,to_attention_us=40,head_us=900"; what is left out is 0."""
        names = {f"{field.removesuffix('_s')}_us": field for field in StageTimes.__dataclass_fields__}
        values = dict.fromkeys(StageTimes.__dataclass_fields__, 0.0)
        given = set()
        for part in text.split(","):
            key, equals, number = part.partition("=")
            key = key.strip()
            try:
                value = float(number) * 1e-6
            except ValueError:
                value = -1.0
            if not equals or key not in names or key in given or not 0.0 <= value < 3600.0:
                raise ConfigError(
                    f"--stages: {part.strip()!r} is not KEY=MICROSECONDS with one of {', '.join(names)}, each once"
                )
            given.add(key)
            values[names[key]] = value
        if values["attention_s"] <= 0.0 or values["ffn_s"] <= 0.0:
            raise ConfigError("--stages: attention_us and ffn_us must be above 0")
        return cls(StageTimes(**values))


class StepTimes:
    """Seconds of one layer (head: of one step) for whole workers. Jitter is spread over all stages.

    fabric: what all workers' rows share between the roles; None = their own links and those of the FFN instances.
    """

    def __init__(self, stages: StageModel, deployment: Deployment, fabric: Fabric | None = None):
        self.fabric = fabric
        self.num_layers, self.vocab = deployment.model.num_layers, deployment.model.vocab
        self._stages = stages
        self._deployment = deployment
        self._alone = deployment.replace(topology=Topology(1, deployment.topology.num_ffn))
        self._ranks = deployment.ranks_per_instance
        self._slack = 1.0 + stages.jitter
        self._attention: dict[tuple[int, int], float] = {}
        self._mixed: dict[tuple[int, ...], float] = {}
        self._head: dict[int, float] = {}
        self._ffn: dict[int, float] = {}
        self._transfer: dict[tuple[int, int], tuple[float, float]] = {}
        self._as_asked: dict[tuple[float, float], tuple[float, float]] = {}  # of `_transfer`, before rounding

    def attention_s(self, load: StepLoad, chunks: Sequence[BatchItem] = ()) -> float:
        """Combine, attention and dispatch of one layer of a worker's micro-batch. chunks: of its items, prefill."""
        if chunks:
            return self._mixed_s(load, chunks)
        key = (rounded(load.num_tokens), rounded(load.context_tokens / load.num_tokens))
        seconds = self._attention.get(key)
        if seconds is None:
            seconds = self._attention[key] = self._slack * self._times(key[0], max(1, key[1])).attention_s
        return seconds

    def _mixed_s(self, load: StepLoad, chunks: Sequence[BatchItem]) -> float:
        num_rows = pairs = span = 0.0
        for item in chunks:
            num_rows += item.num_new
            pairs += attended(item.start, item.num_new)
            span += item.start + item.num_new
        num_decodes = load.num_tokens - num_rows
        context = (load.context_tokens - pairs) / num_decodes if num_decodes else 0.0
        key = (
            rounded(num_decodes),
            rounded(context),
            *(rounded(value, _PREFILL_BITS) for value in (num_rows, pairs / num_rows, span / len(chunks))),
            len(chunks),
        )
        seconds = self._mixed.get(key)
        if seconds is None:
            if len(self._mixed) == _MAX_MIXED:
                self._mixed.clear()
            decodes, decode_context, rows, row_context, chunk_span, num_chunks = key
            prefill = Prefill(rows, row_context, num_chunks, chunk_span).split(self._ranks)
            times = self._stages.times(self._deployment, max(1, decode_context), decodes / self._ranks, prefill)
            seconds = self._mixed[key] = self._slack * times.attention_s
        return seconds

    def head_s(self, num_samples: float) -> float:
        """LM head and sampling of `num_samples` rows; 0 for none."""
        if not num_samples:
            return 0.0
        key = rounded(num_samples)
        seconds = self._head.get(key)
        if seconds is None:
            seconds = self._head[key] = self._slack * self._times(key).head_s
        return seconds

    def ffn_s(self, gang_tokens: float) -> float:
        """One layer on every FFN rank, for the rows of a whole gang."""
        key = rounded(gang_tokens)
        seconds = self._ffn.get(key)
        if seconds is None:
            per_worker = key / self._deployment.topology.num_attention
            seconds = self._ffn[key] = self._slack * self._times(per_worker).ffn_s
        return seconds

    def transfer_s(self, num_tokens: float, gang_tokens: float) -> tuple[float, float]:
        """(rows of a worker's micro-batch to the FFN ranks, their answers back).

        At the worker's end its own rows count, at the FFN's end all rows of the gang: whichever takes longer.
        """
        known = self._as_asked.get((num_tokens, gang_tokens))
        if known is None:
            if len(self._as_asked) == _MAX_AS_ASKED:
                self._as_asked.clear()
            known = self._as_asked[num_tokens, gang_tokens] = self._rounded_transfer_s(num_tokens, gang_tokens)
        return known

    def _rounded_transfer_s(self, num_tokens: float, gang_tokens: float) -> tuple[float, float]:
        own, gang = rounded(num_tokens), rounded(max(num_tokens, gang_tokens))
        seconds = self._transfer.get((own, gang))
        if seconds is None:
            shared = self.fabric or _NO_FABRIC
            alone = self._stages.times(self._alone, 1, own / self._ranks)
            merged = self._times(gang / self._deployment.topology.num_attention)
            seconds = self._transfer[own, gang] = (
                max(self._slack * alone.to_ffn_s, self._slack * merged.to_ffn_s, own * shared.to_ffn_s),
                max(
                    self._slack * alone.to_attention_s, self._slack * merged.to_attention_s, own * shared.to_attention_s
                ),
            )
        return seconds

    def _times(self, num_tokens: float, context: int = 1) -> StageTimes:
        return self._stages.times(self._deployment, context, num_tokens / self._ranks)


def rounded(value: float, bits: int = _BITS) -> int:
    """The nearest whole number of at most so many significant bits; at least 1 for what is above 0."""
    number = int(value + 0.5)
    if number < 1 << bits:
        return number or int(value > 0.0)
    shift = number.bit_length() - bits
    return ((number + (1 << (shift - 1))) >> shift) << shift

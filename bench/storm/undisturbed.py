"""What an undisturbed run says, in float32 and in this process: which tokens of a storm are wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import TOP2_TOLERANCE, shortfalls
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel
from bench.storm.account import Stream


class Undisturbed:
    """The model on one thread. Every token is judged after the tokens before it, so nothing behind one that rounding
    explains goes unjudged."""

    def __init__(self, model: str):
        torch.set_num_threads(1)
        folder, ops = resolve_model(model), select("cpu", "float32")
        self._attention = load_attention_half(folder, ops)
        self._ffn = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), ops)

    @property
    def vocab_size(self) -> int:
        return self._attention.spec.vocab_size

    def judge(self, streams: Sequence[Stream], prompts: Sequence[Sequence[int]]) -> int:
        """Fill `num_wrong` of every stream; how many streams differ from what most of their prompt say, by rounding
        or not."""
        outputs: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
        for stream in streams:
            if not stream.error:
                outputs[stream.prompt_idx][tuple(stream.ids)] += 1
        common = {idx: counts.most_common(1)[0][0] for idx, counts in outputs.items()}
        wrong: dict[tuple[int, tuple[int, ...]], int] = {}
        num_different = 0
        for stream in streams:
            if not stream.ids:
                continue
            ids = tuple(stream.ids)
            key = stream.prompt_idx, ids
            if key not in wrong:
                found = shortfalls(self._attention, [self._ffn], prompts[stream.prompt_idx], ids)
                wrong[key] = sum(shortfall > TOP2_TOLERANCE for shortfall in found)
            stream.num_wrong = wrong[key]
            num_different += ids != common.get(stream.prompt_idx, ids)[: len(ids)]
        return num_different

"""The in-process reference: both halves back to back, one sequence. The oracle of every end-to-end test.

`compare` is the equality rule: batch shapes change rounding, so a first difference counts only where the reference's
two largest logits are further apart than rounding can explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.errors import RequestError
from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.halves import AttentionHalf, FFNHalf
from afd.model.sampling import RowLogprobs, Sampler
from afd.types import SamplingParams

BLOCK_SIZE = 16
TOP2_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ReferenceOutput:
    """One entry per generated token.  top2_gaps: between the two largest logits that it was drawn from."""

    token_ids: list[int]
    logprobs: list[RowLogprobs | None]
    top2_gaps: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """ok: equal, or different from `position` on with the excuse of a top-2 gap within the tolerance (`excused`)."""

    ok: bool
    excused: bool = False
    position: int | None = None
    gap: float | None = None


def forward(
    attention: AttentionHalf,
    ffns: Sequence[FFNHalf],
    token_ids: Tensor,
    batch: AttentionBatch,
    cache: KVCache,
) -> Tensor:
    """token_ids [n] -> residual after the last layer [n, hidden]; one shard of the FFN per entry of `ffns`."""
    x = attention.embed(token_ids)
    for layer_idx in range(attention.spec.num_layers):
        dispatch = attention.layer(layer_idx, x, batch, cache)
        attention.combine(x, [ffn.layer(dispatch) for ffn in ffns])
    return x


@torch.inference_mode()
def reference_generate(
    attention: AttentionHalf,
    ffns: Sequence[FFNHalf],
    prompt_ids: Sequence[int],
    params: SamplingParams,
    chunk: int | None = None,
) -> ReferenceOutput:
    """Generate alone, without scheduler or transport.

    chunk: prefill in pieces of so many tokens; None = at once.

    Stops at max_tokens, at a stop token (which is in the output, as a worker reports it), or at the model's context.
    """
    spec = attention.spec
    limit = min(params.max_tokens, spec.max_context - len(prompt_ids))
    if not prompt_ids or limit < 1:
        raise RequestError(
            f"a prompt of {len(prompt_ids)} tokens leaves nothing to generate (context: {spec.max_context})"
        )
    num_blocks = -(-(len(prompt_ids) + limit) // BLOCK_SIZE)
    cache = KVCache(spec, num_blocks, BLOCK_SIZE, attention.dtype, str(attention.device))
    blocks = range(num_blocks)
    output = ReferenceOutput([], [], [])
    sampler = Sampler(attention.ops)
    pending, start = list(prompt_ids), 0
    while True:
        step = pending[:chunk]
        batch = AttentionBatch.build([(start, len(step), blocks)], BLOCK_SIZE, attention.device)
        tokens = torch.tensor(step, dtype=torch.int64, device=attention.device)
        x = forward(attention, ffns, tokens, batch, cache)
        pending, start = pending[len(step) :], start + len(step)
        if pending:
            continue
        history = (prompt_ids, output.token_ids)
        drawn = sampler.sample(attention.logits(x[-1:]), [params], [len(output.token_ids)], [history], with_gaps=True)
        token = drawn.ids[0]
        assert token >= 0 and drawn.top2_gaps is not None, "the reference's logits are not finite"
        output.token_ids.append(token)
        output.logprobs.append(drawn.logprobs[0])
        output.top2_gaps.append(drawn.top2_gaps[0])
        if len(output.token_ids) == limit or token in params.stop_token_ids:
            return output
        pending = [token]


def compare(reference: ReferenceOutput, got_ids: Sequence[int], tolerance: float = TOP2_TOLERANCE) -> Comparison:
    """The equality rule.  A length that differs with all tokens equal is a failure: no rounding explains it."""
    expected = reference.token_ids
    for position, (want, got) in enumerate(zip(expected, got_ids, strict=False)):
        if want != got:
            gap = reference.top2_gaps[position]
            return Comparison(ok=gap <= tolerance, excused=gap <= tolerance, position=position, gap=gap)
    if len(expected) != len(got_ids):
        return Comparison(ok=False, position=min(len(expected), len(got_ids)))
    return Comparison(ok=True)


@torch.inference_mode()
def shortfalls(
    attention: AttentionHalf, ffns: Sequence[FFNHalf], prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> list[float]:
    """How far each output token's logit lies below the largest one, after the prompt and the output before it.

    One pass over all tokens. 0.0 = the greedy choice; at most `TOP2_TOLERANCE` = rounding may have chosen.
    """
    tokens = [*prompt_ids, *output_ids[:-1]]
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    cache = KVCache(attention.spec, num_blocks, BLOCK_SIZE, attention.dtype, str(attention.device))
    batch = AttentionBatch.build([(0, len(tokens), range(num_blocks))], BLOCK_SIZE, attention.device)
    x = forward(attention, ffns, torch.tensor(tokens, dtype=torch.int64, device=attention.device), batch, cache)
    logits = attention.logits(x[len(prompt_ids) - 1 :]).float()
    chosen = logits.gather(1, torch.tensor(output_ids, device=logits.device)[:, None])[:, 0]
    return (logits.amax(1) - chosen).tolist()

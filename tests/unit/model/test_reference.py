"""The in-process reference: Step-3 against another engine's golden file, in every sharding; the equality rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from afd.errors import RequestError
from afd.model.halves import AttentionHalf, FFNHalf
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import Comparison, ReferenceOutput, compare, reference_generate, shortfalls
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel, SamplingParams
from tests.unit.model.model_files import STEP3_TINY

GREEDY = SamplingParams(max_tokens=24, seed=0, temperature=0.0, logprobs=8)


@pytest.fixture(scope="module")
def attention() -> AttentionHalf:
    return load_attention_half(resolve_model(str(STEP3_TINY)), select("cpu", "float32"))


def ffns(num_ranks: int = 1, parallel: FfnParallel = FfnParallel.HYBRID, dtype: str = "float32") -> list[FFNHalf]:
    folder = resolve_model(str(STEP3_TINY))
    return [
        load_ffn_half(folder, ShardSpec(rank, num_ranks, parallel), select("cpu", dtype)) for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("parallel", FfnParallel)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_step3_golden(
    attention: AttentionHalf, golden_cases: list[dict[str, Any]], num_ranks: int, parallel: FfnParallel
) -> None:
    shards = ffns(num_ranks, parallel)
    for case in golden_cases:
        params = replace(GREEDY, max_tokens=len(case["greedy_token_ids"]))
        got = reference_generate(attention, shards, case["prompt_token_ids"], params)
        assert got.token_ids == case["greedy_token_ids"]
        for row, expected in zip(got.logprobs, case["top_logprobs"], strict=True):
            assert row is not None
            assert dict(row[1]) == pytest.approx({int(k): v for k, v in expected.items()}, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_prefill_in_chunks_changes_nothing(
    attention: AttentionHalf, golden_cases: list[dict[str, Any]], chunk: int
) -> None:
    case = max(golden_cases, key=lambda c: len(c["prompt_token_ids"]))
    whole = reference_generate(attention, ffns(), case["prompt_token_ids"], GREEDY)
    chunked = reference_generate(attention, ffns(), case["prompt_token_ids"], GREEDY, chunk=chunk)
    assert compare(whole, chunked.token_ids).ok
    assert chunked.top2_gaps == pytest.approx(whole.top2_gaps, abs=1e-4)


def test_bfloat16_stays_near_float32(golden_cases: list[dict[str, Any]]) -> None:
    """Log-probabilities of the first token: a mean over all cases, for a router's choice may flip in bfloat16."""
    low = load_attention_half(resolve_model(str(STEP3_TINY)), select("cpu", "bfloat16"))
    shards = ffns(2, dtype="bfloat16")
    errors = []
    for case in golden_cases:
        got = reference_generate(low, shards, case["prompt_token_ids"], replace(GREEDY, max_tokens=1, logprobs=512))
        assert got.logprobs[0] is not None
        values = dict(got.logprobs[0][1])
        errors += [abs(values[int(token)] - expected) for token, expected in case["top_logprobs"][0].items()]
    assert sum(errors) / len(errors) < 0.1


def test_the_same_seed_gives_the_same_text_and_stop_ids_end_it(attention: AttentionHalf) -> None:
    params = SamplingParams(max_tokens=12, seed=5, temperature=1.5)
    first, second = (reference_generate(attention, ffns(), [4, 5, 6], params) for _ in range(2))
    other = reference_generate(attention, ffns(), [4, 5, 6], replace(params, choice=1))
    assert first == second and first.token_ids != other.token_ids
    stop = first.token_ids[3]
    stopped = reference_generate(attention, ffns(), [4, 5, 6], replace(params, stop_token_ids=(stop,)))
    assert stopped.token_ids == first.token_ids[: first.token_ids.index(stop) + 1]


def test_the_context_bounds_the_output(attention: AttentionHalf) -> None:
    prompt = [1] * (attention.spec.max_context - 2)
    assert len(reference_generate(attention, ffns(), prompt, GREEDY).token_ids) == 2
    for wrong in ([], [1] * attention.spec.max_context):
        with pytest.raises(RequestError, match="leaves nothing to generate"):
            reference_generate(attention, ffns(), wrong, GREEDY)


def test_shortfalls_judge_each_token_after_those_before_it(
    attention: AttentionHalf, golden_cases: list[dict[str, Any]]
) -> None:
    prompt, params = golden_cases[0]["prompt_token_ids"], replace(GREEDY, max_tokens=8)
    said = reference_generate(attention, ffns(), prompt, params).token_ids
    assert shortfalls(attention, ffns(), prompt, said) == [0.0] * 8
    other = (said[3] + 1) % attention.spec.vocab_size
    behind = reference_generate(attention, ffns(), [*prompt, *said[:3], other], replace(params, max_tokens=4)).token_ids
    found = shortfalls(attention, ffns(), prompt, [*said[:3], other, *behind])
    assert found[3] > 1e-3 and found[:3] + found[4:] == [0.0] * 7


def test_combine_adds_in_float32_in_rank_order(attention: AttentionHalf) -> None:
    x = torch.ones(1, 2)
    partials = [torch.full((1, 2), value, dtype=torch.bfloat16) for value in (256.0, 1.0, -256.0)]
    attention.combine(x, partials)
    assert x.tolist() == [[2.0, 2.0]]  # in bfloat16, 256 + 1 = 256 and the result would be 1


def test_a_layer_can_be_dispatched_again_from_the_residual(attention: AttentionHalf) -> None:
    x = torch.randn(3, attention.spec.hidden, generator=torch.Generator().manual_seed(0))
    first, second = attention.dispatch(1, x), attention.dispatch(1, x)
    assert torch.equal(first.rows, second.rows)
    assert first.expert_ids is not None and second.expert_ids is not None
    assert torch.equal(first.expert_ids, second.expert_ids)


REFERENCE = ReferenceOutput([5, 6, 7], [None] * 3, [2.0, 5e-4, 2.0])


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([5, 6, 7], Comparison(ok=True)),
        ([5, 9, 1, 2], Comparison(ok=True, excused=True, position=1, gap=5e-4)),
        ([9, 6, 7], Comparison(ok=False, position=0, gap=2.0)),
        ([5, 6, 9], Comparison(ok=False, position=2, gap=2.0)),
        ([5, 6], Comparison(ok=False, position=2)),
        ([5, 6, 7, 8], Comparison(ok=False, position=3)),
    ],
)
def test_the_equality_rule(got: list[int], expected: Comparison) -> None:
    assert compare(REFERENCE, got) == expected

"""The sampler: its filters against an obvious twin, its distribution, and how alike similar distributions are drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from afd.model.sampling import Sampler, takes_largest
from afd.ops.philox import exponentials
from afd.ops.select import select
from afd.types import SamplingParams

OPS = select("cpu", "float32")
GREEDY = SamplingParams(max_tokens=8, seed=0, temperature=0.0)


def _logits(seed: int, vocab: int, ties: bool) -> torch.Tensor:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.bfloat16().float() if ties else logits


def _twin_probabilities(
    row: torch.Tensor, params: SamplingParams, position: int, prompt: list[int], output: list[int]
) -> tuple[list[int], np.ndarray]:
    """(ids by falling logit then rising id, their probabilities), by sorting everything and loops over tokens."""
    logits = row.double().tolist()
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in set(prompt + output):
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if position < params.min_tokens:
        for token in params.stop_token_ids:
            logits[token] = -math.inf
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.greedy:
        return order[:1], np.ones(1)
    weights = np.array([math.exp((logits[i] - logits[order[0]]) / params.temperature) for i in order])
    keep = np.ones(len(order), bool)
    if params.top_k:
        keep[params.top_k :] = False
    keep &= weights >= params.min_p
    mass, kept = weights[keep].sum(), 0.0
    for rank in np.flatnonzero(keep):
        if kept >= params.top_p * mass:
            keep[rank] = False
        kept += weights[rank]
    return order, np.where(keep, weights, 0.0) / weights[keep].sum()


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(8),
    seed=st.integers(0, 2**63),
    choice=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 10_000]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    stop_token_ids=st.just((3, 7)),
    min_tokens=st.sampled_from([0, 4]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((0, 5.0), (9, -100.0))]),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    params=PARAMS,
    position=st.integers(0, 8),
    logits_seed=st.integers(0, 10_000),
    vocab=st.sampled_from([11, 200, 1536]),
    ties=st.booleans(),
    prompt=st.lists(st.integers(0, 10), max_size=5),
    output=st.lists(st.integers(0, 10), max_size=5),
)
def test_against_the_twin(
    params: SamplingParams, position: int, logits_seed: int, vocab: int, ties: bool,
    prompt: list[int], output: list[int],
) -> None:  # fmt: skip
    """Of the tokens that the twin leaves, the one whose exponential variate over its probability is the least."""
    row = _logits(logits_seed, vocab, ties)
    got = Sampler(OPS).sample(row[None], [params], [position], [(prompt, output)]).ids[0]
    ids, probabilities = _twin_probabilities(row, params, position, prompt, output)
    if params.greedy:
        assert got == ids[0]
        return
    numbers = exponentials(params.seed, params.choice, position, vocab)[ids]
    times = np.full(len(ids), np.inf)
    np.divide(numbers, probabilities, out=times, where=probabilities > 0)
    first, *others = np.sort(times)[:2]
    assume(not others or others[0] > first * (1 + 1e-5))  # a dead heat, which rounding may decide
    assert got == ids[int(times.argmin())] or _nucleus_edge(row, params, position, prompt, output)


def _nucleus_edge(
    row: torch.Tensor, params: SamplingParams, position: int, prompt: list[int], output: list[int]
) -> bool:
    """True when a cut of top_p or min_p falls within rounding of a token's edge."""
    wide = replace(params, top_p=1.0)
    _, probabilities = _twin_probabilities(row, wide, position, prompt, output)
    on_top_p = np.abs(np.cumsum(probabilities) - params.top_p).min() < 1e-5
    _, all_probabilities = _twin_probabilities(row, replace(wide, min_p=0.0), position, prompt, output)
    on_min_p = np.abs(all_probabilities / all_probabilities[0] - params.min_p).min() < 1e-5
    return bool(on_top_p or on_min_p)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(PARAMS, st.integers(0, 8)), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[SamplingParams, int]], seed: int) -> None:
    params = [replace(p, logprobs=2) for p, _ in rows]
    positions = [position for _, position in rows]
    logits = torch.stack([_logits(seed + i, 700, ties=i % 2 == 0) for i in range(len(rows))])
    histories = [([1, 2], [3] * i) for i in range(len(rows))]
    together = Sampler(OPS).sample(logits, params, positions, histories)
    for i in range(len(rows)):
        alone = Sampler(OPS).sample(logits[i : i + 1], params[i : i + 1], positions[i : i + 1], histories[i : i + 1])
        assert alone.ids == [together.ids[i]] and alone.logprobs == [together.logprobs[i]]


def _draws(row: torch.Tensor, count: int, **changes: float) -> np.ndarray:
    """As many tokens of one distribution, each with a seed of its own."""
    params = [SamplingParams(max_tokens=1, seed=seed, **changes) for seed in range(count)]  # type: ignore[arg-type]
    return np.array(Sampler(OPS).sample(row.expand(count, len(row)), params, [0] * count).ids)


@pytest.mark.parametrize(
    ("vocab", "changes"),
    [
        (4, {"top_k": 3}),
        (200, {}),
        (200, {"temperature": 1.7}),
        (200, {"top_p": 0.9}),
        (200, {"min_p": 0.05}),
        (200, {"top_k": 30, "top_p": 0.8, "temperature": 0.7}),
    ],
)
def test_samples_follow_the_distribution(vocab: int, changes: dict[str, float]) -> None:
    row, num_draws = _logits(5, vocab, ties=False), 20_000
    ids, probabilities = _twin_probabilities(row, SamplingParams(max_tokens=1, seed=0, **changes), 0, [], [])  # type: ignore[arg-type]
    counts = np.bincount(_draws(row, num_draws, **changes), minlength=vocab)[ids]
    assert not counts[probabilities == 0].any()
    expected = probabilities * num_draws
    often = expected >= 10  # the rest are taken together
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    limit = freedom + 3.1 * math.sqrt(2 * freedom) + 4  # beyond p = 0.001 for every number of degrees of freedom here
    assert ((counts - expected) ** 2 / expected).sum() < limit


@pytest.mark.parametrize(("vocab", "noise"), [(50, 0.1), (1000, 0.1), (1000, 0.5), (1000, 1.5)])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_similar_distributions_mostly_give_the_same_token(vocab: int, noise: float, top_p: float) -> None:
    """With the same numbers p and q agree at least as often as (1 - d) / (1 + d), d their total variation distance."""
    target = _logits(1, vocab, ties=False)
    draft = target + noise * torch.randn(vocab, generator=torch.Generator().manual_seed(9))
    params, num_draws = SamplingParams(max_tokens=1, seed=0, top_p=top_p), 4000
    distributions = []
    for row in (target, draft):
        ids, probabilities = _twin_probabilities(row, params, 0, [], [])
        by_id = np.zeros(vocab)
        by_id[ids] = probabilities
        distributions.append(by_id)
    distance = np.abs(distributions[0] - distributions[1]).sum() / 2
    bound = (1 - distance) / (1 + distance)
    agreed = (_draws(target, num_draws, top_p=top_p) == _draws(draft, num_draws, top_p=top_p)).mean()
    deviation = math.sqrt(bound * (1 - bound) / num_draws)
    assert bound - 3.1 * deviation <= agreed <= 1 - distance + 3.1 * deviation


def test_greedy_ties_go_to_the_lower_id_and_logits_stay_untouched() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    before = logits.clone()
    biased = replace(GREEDY, logit_bias=((3, 9.0),))
    got = Sampler(OPS).sample(logits.expand(2, 4).contiguous(), [GREEDY, biased], [0, 0])
    assert got.ids == [1, 3]
    assert torch.equal(logits, before)


def test_min_tokens_masks_stop_ids_until_reached() -> None:
    params = replace(GREEDY, stop_token_ids=(2,), min_tokens=3)
    logits = torch.tensor([[0.0, 1.0, 5.0]]).expand(2, 3)
    assert Sampler(OPS).sample(logits, [params, params], [2, 3]).ids == [1, 2]
    assert not takes_largest(params, 2) and takes_largest(params, 3)


def test_where_everything_is_masked_the_first_token_is_taken() -> None:
    params = SamplingParams(max_tokens=8, seed=3, stop_token_ids=(0, 1, 2), min_tokens=3)
    assert Sampler(OPS).sample(torch.tensor([[0.0, 1.0, 5.0]]), [params], [0]).ids == [0]


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    params = replace(GREEDY, temperature=0.2, logprobs=3, logit_bias=((17, 50.0),))
    got = Sampler(OPS).sample(logits, [params], [0])
    assert got.ids == [17]
    expected = torch.log_softmax(logits[0].double(), 0)
    sampled, top = got.logprobs[0] or (0.0, [])
    assert sampled == pytest.approx(float(expected[17]), abs=1e-6)
    best = expected.topk(3)
    assert [token for token, _ in top] == best.indices.tolist()
    assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-6)
    none, zero = Sampler(OPS).sample(logits.expand(2, 300), [GREEDY, replace(GREEDY, logprobs=0)], [0, 0]).logprobs
    assert none is None and zero is not None and zero[1] == []


def test_gaps_on_request() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, 0.0]])
    assert Sampler(OPS).sample(logits, [GREEDY] * 2, [0, 0], with_gaps=True).top2_gaps == [0.5, 0.0]
    assert Sampler(OPS).sample(logits, [GREEDY] * 2, [0, 0]).top2_gaps is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_reported_and_the_others_served(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 2.0, 1.0], [-math.inf] * 3])
    for params in (replace(GREEDY, logprobs=1), replace(GREEDY, temperature=0.01, top_p=0.9, logprobs=1)):
        got = Sampler(OPS).sample(logits, [params] * 3, [0] * 3)
        assert got.ids == [-1, 1, -1] and got.invalid == (0, 2)
        assert got.logprobs[0] is None and got.logprobs[1] is not None


@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-9])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.999, -1.0]])
    params = SamplingParams(max_tokens=1, seed=5, temperature=temperature)
    assert Sampler(OPS).sample(logits, [params], [0]).ids == [1]


def test_a_tiny_temperature_is_greedy_and_an_empty_batch_ordinary() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(max_tokens=1, seed=4, temperature=1e-40, top_p=0.9)
    assert Sampler(OPS).sample(logits, [params], [0]).ids == [int(logits.argmax())]
    assert Sampler(OPS).sample(torch.empty(0, 10), [], []).ids == []

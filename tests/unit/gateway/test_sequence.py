"""One choice's output: whatever happens to its token messages, the client gets each token once and in order."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.gateway.sequence import ClientSequence, Delta, Verdict
from afd.gateway.stop import StopMatcher
from afd.messages.serving import TokenChunk, TokenLogprobs
from afd.types import FinishReason, SamplingParams
from tests.fakes.text_model import text_model

MODEL = text_model()
TOKENIZER = MODEL.tokenizer
END = MODEL.eos_token_ids[0]


def make(stops=(), *, stop_token_ids=(END,), own=(), max_tokens=100, min_tokens=0, include=False):
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=1, stop_token_ids=tuple(stop_token_ids), min_tokens=min_tokens
    )
    return ClientSequence(
        "r",
        0,
        [1, 2, 3],
        sampling,
        sink=None,
        detokenizer=TOKENIZER.detokenizer(),
        stop=StopMatcher(stops, include=include) if stops else None,
        own_stop_ids=own,
    )


def chunk(first_idx, ids, finish=None, **fields):
    return TokenChunk("r", fields.pop("attempt", 0), first_idx, list(ids), finish=finish, **fields)


def feed(sequence, chunks):
    """Feed chunks until the sequence is done; the deltas as one."""
    total = Delta(0, "", [])
    for piece in chunks:
        outcome = sequence.accept(piece)
        if isinstance(outcome, Delta):
            total = total.merged(outcome)
        if sequence.done:
            break
    return total


def chunked(ids, finish, cuts):
    edges = sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    pieces = [chunk(a, ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces[:-1], chunk(pieces[-1].first_idx, pieces[-1].ids, finish)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    text=st.text("ab \n日", min_size=1, max_size=20),
    stops=st.lists(st.text("ab \n日", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 100), max_size=6),
    min_tokens=st.integers(0, 5),
    include=st.booleans(),
)
def test_the_cut_into_chunks_changes_nothing(text, stops, cuts, min_tokens, include):
    ids = TOKENIZER.encode(text)
    options = {"min_tokens": min_tokens, "include": include}
    one_by_one = feed(make(tuple(stops), **options), chunked(ids, FinishReason.LENGTH, range(len(ids))))
    any_cut = feed(make(tuple(stops), **options), chunked(ids, FinishReason.LENGTH, cuts))
    assert any_cut == one_by_one
    if not stops:
        assert any_cut.text == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_duplicates_and_losses_on_the_way(seed):
    """A lossy, repeating link with a sender that answers Resend: exactly the sent tokens arrive."""
    rng = random.Random(seed)
    ids = TOKENIZER.encode("the quick brown fox hello world")
    sequence, total, sent = make(), Delta(0, "", []), 0
    for _ in range(1000):
        first, sent = max(0, sent - rng.randrange(3)), min(len(ids), sent + rng.randrange(4))
        piece = chunk(first, ids[first:sent], FinishReason.LENGTH if sent == len(ids) else None)
        if rng.random() < 0.3:
            continue
        outcome = sequence.accept(piece)
        if outcome is Verdict.GAP:
            sent = len(sequence.output_ids)
        elif isinstance(outcome, Delta):
            total = total.merged(outcome)
        if sequence.done:
            break
    assert sequence.done
    assert total.ids == ids == sequence.output_ids
    assert total.text == TOKENIZER.decode(ids)


def test_old_attempts_are_dropped():
    sequence = make()
    sequence.attempt = 1
    assert sequence.accept(chunk(0, [5], attempt=0)) is Verdict.STALE
    assert sequence.accept(chunk(0, [5], attempt=2)) is Verdict.STALE
    assert sequence.output_ids == []


def test_nothing_is_taken_after_the_end():
    sequence = make()
    sequence.accept(chunk(0, [40], FinishReason.LENGTH))
    assert sequence.accept(chunk(1, [41])) is Verdict.STALE


def test_logprobs_stay_with_their_tokens():
    sequence = make()
    logprobs = [TokenLogprobs(-float(i), []) for i in range(4)]
    sequence.accept(chunk(0, [40, 41], logprobs=logprobs[:2]))
    delta = sequence.accept(chunk(1, [41, 42, 43], logprobs=logprobs[1:]))
    assert delta.ids == [42, 43]
    assert delta.logprobs == logprobs[2:]


@pytest.mark.parametrize(("own", "reason"), [((), None), ((END,), END)], ids=["EOS", "client's own"])
def test_the_stop_token_counts_but_is_not_shown(own, reason):
    sequence = make(own=own)
    delta = sequence.accept(chunk(0, [*TOKENIZER.encode("ab"), END], FinishReason.STOP))
    assert (delta.text, delta.finish, delta.stop_reason) == ("ab", FinishReason.STOP, reason)
    assert sequence.output_ids[-1] == END


def test_a_visible_stop_token_is_not_shown_either():
    (letter,) = TOKENIZER.encode("b")
    sequence = make(stop_token_ids=(letter,), own=(letter,))
    delta = sequence.accept(chunk(0, [*TOKENIZER.encode("ab")], FinishReason.STOP))
    assert (delta.text, delta.stop_reason) == ("a", letter)


def test_output_ends_with_the_token_that_completes_a_stop_string():
    sequence = make(("world",))
    ids = TOKENIZER.encode("hello world, and more")
    delta = sequence.accept(chunk(0, ids))
    assert (delta.text, delta.finish, delta.stop_reason) == ("hello ", FinishReason.STOP, "world")
    assert TOKENIZER.decode(sequence.output_ids) == "hello world"
    assert sequence.done


def test_stop_strings_wait_for_min_tokens():
    ids = TOKENIZER.encode("abab")
    delta = feed(make(("b",), min_tokens=2), [chunk(0, ids)])
    assert delta.text == "aba"


def test_a_failure_leaves_the_text_open_for_another_worker():
    sequence = make(("hello world",))
    ids = TOKENIZER.encode("hello wo日rest")
    cut = len(TOKENIZER.encode("hello wo")) + 1  # inside the character 日
    first = sequence.accept(chunk(0, ids[:cut], FinishReason.ERROR, error="lost"))
    assert first.finish is FinishReason.ERROR
    assert not sequence.done
    sequence.attempt += 1
    second = sequence.accept(chunk(cut, ids[cut:], FinishReason.LENGTH, attempt=1))
    assert first.text + second.text == "hello wo日rest"


def test_cached_tokens_are_those_of_the_prompt():
    sequence = make()
    sequence.accept(chunk(0, [40], cached_tokens=2))
    sequence.accept(chunk(1, [41], cached_tokens=99))
    assert sequence.cached_tokens == 2

"""Text is exact: whatever the vocabulary, the text, the cut between prompt and output, and the pieces it comes in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.gateway.tokenizer import TextOffsets, TextTokenizer
from tests.fakes.vocabularies import CHARS, LIBRARY, OURS

KINDS = list(OURS)
texts = st.text(st.sampled_from(CHARS), min_size=1, max_size=14)
many = settings(max_examples=300, deadline=None, derandomize=True)


def pieces_of(detokenizer, ids, size):
    return [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)] + [detokenizer.flush()]


def after(tokenizer, prompt_ids, ids, size=1):
    """The output's text behind a prompt."""
    return "".join(pieces_of(tokenizer.detokenizer(prompt_ids), ids, size))


def offsets_of(tokenizer, prompt_ids, ids):
    offsets = TextOffsets(tokenizer.detokenizer(prompt_ids))
    return [offsets.next(token_id) for token_id in ids]


@many
@given(kind=st.sampled_from(KINDS), text=texts, size=st.integers(1, 5))
def test_the_pieces_of_an_output_make_its_text(kind, text, size):
    ids = LIBRARY[kind].encode(text, add_special_tokens=False).ids
    pieces = pieces_of(OURS[kind].detokenizer(), ids, size)
    assert "".join(pieces) == LIBRARY[kind].decode(ids) == OURS[kind].decode(ids)
    if kind != "unigrams":  # that one takes a space that the text begins with for its own
        assert "".join(pieces) == text


@many
@given(kind=st.sampled_from(KINDS), text=texts, cut=st.integers(0, 60), size=st.integers(1, 5))
def test_prompt_and_output_make_the_whole_wherever_the_cut_is(kind, text, cut, size):
    ids = LIBRARY[kind].encode(text, add_special_tokens=False).ids
    prompt_ids, output_ids = ids[: cut % (len(ids) + 1)], ids[cut % (len(ids) + 1) :]
    prompt = OURS[kind].prompt_text(prompt_ids)
    output = after(OURS[kind], prompt_ids, output_ids, size)
    assert prompt + output == LIBRARY[kind].decode(ids)
    assert "\ufffd" in text or "\ufffd" not in prompt  # the character at the seam is the output's


@many
@given(kind=st.sampled_from(KINDS), text=texts, cut=st.integers(0, 60), end=st.integers(0, 60))
def test_an_output_that_ends_inside_a_character_shows_it_as_replaced(kind, text, cut, end):
    ids = LIBRARY[kind].encode(text, add_special_tokens=False).ids
    ids = ids[: end % (len(ids) + 1)]
    cut %= len(ids) + 1
    whole = OURS[kind].prompt_text(ids)
    answer = OURS[kind].prompt_text(ids[:cut]) + after(OURS[kind], ids[:cut], ids[cut:])
    assert answer.startswith(whole)
    assert len(OURS[kind].partial_bytes(ids)) >= len(answer[len(whole) :]) >= bool(OURS[kind].partial_bytes(ids))
    assert set(answer[len(whole) :]) <= {"\ufffd"}


@many
@given(kind=st.sampled_from(KINDS), seed=st.lists(st.integers(0, 10_000), max_size=25), size=st.integers(2, 6))
def test_any_tokens_give_the_same_text_at_once_and_one_by_one(kind, seed, size):
    tokenizer = OURS[kind]
    ids = [value % (tokenizer.vocab_size + 3) for value in seed]
    one_by_one = after(tokenizer, [], ids)
    assert after(tokenizer, [], ids, size) == one_by_one
    assert after(tokenizer, [], ids, len(ids) + 1) == one_by_one
    if kind == "byte level":
        assert one_by_one == b"".join(tokenizer.shown_bytes(i) for i in ids).decode(errors="replace")


@many
@given(kind=st.sampled_from(KINDS), text=texts, cut=st.integers(0, 60))
def test_offsets_are_places_in_the_text(kind, text, cut):
    ids = LIBRARY[kind].encode(text, add_special_tokens=False).ids
    prompt_ids, output_ids = ids[: cut % (len(ids) + 1)], ids[cut % (len(ids) + 1) :]
    output = after(OURS[kind], prompt_ids, output_ids)
    offsets = offsets_of(OURS[kind], prompt_ids, output_ids)
    assert offsets == sorted(offsets)
    rest = output.encode()
    if prompt_ids:  # bytes of the first character that the prompt has
        rest = rest[len(OURS[kind].partial_bytes(prompt_ids)) :]
    place = len(output.encode()) - len(rest)
    for token_id, offset in zip(output_ids, offsets, strict=True):
        token_bytes = OURS[kind].shown_bytes(token_id)
        if place == 0 and not output.encode().startswith(token_bytes):
            token_bytes = token_bytes.removeprefix(b" ")  # a text does not begin with the tokenizer's own space
        assert output.encode()[place : place + len(token_bytes)] == token_bytes
        # The character that this byte is part of:
        assert offset == len(output.encode()[:place].decode(errors="ignore"))
        place += len(token_bytes)
    assert place == len(output.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_no_character_are_before_the_token_that_shows_it(kind):
    ids = [
        next(i for i in range(OURS[kind].vocab_size) if OURS[kind].token_bytes(i) == data)
        for data in (b"\xf0", b"\x9f", b"a")
    ]
    output = after(OURS[kind], [], ids)
    *_, last = offsets_of(OURS[kind], [], ids)
    assert output[last:] == "a"
    assert set(output[:last]) == {"\ufffd"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", range(1, 4))
def test_the_character_at_the_seam_is_the_outputs(kind, cut):
    tokenizer = OURS[kind]
    wave = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b])) for b in "🌊".encode()
    ]
    hello, rest = (
        LIBRARY[kind].encode("hello", add_special_tokens=False).ids,
        LIBRARY[kind].encode("hello ab", add_special_tokens=False).ids,
    )
    prompt_ids = hello + wave[:cut]
    output_ids = wave[cut:] + rest[len(hello) :]
    assert tokenizer.prompt_text(prompt_ids) == "hello"
    assert after(tokenizer, prompt_ids, output_ids) == "🌊 ab"
    assert offsets_of(tokenizer, prompt_ids, output_ids)[: 5 - cut] == [0] * (4 - cut) + [1]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_hidden_in_outputs_and_named_in_prompts(kind):
    tokenizer, library = OURS[kind], LIBRARY[kind]
    begin, end = library.token_to_id("<s>"), library.token_to_id("</s>")
    one, two = (library.encode(text, add_special_tokens=False).ids for text in ("hello", "hello w"))
    output_ids = [*one, end, *two[len(one) :], end]
    assert after(tokenizer, [], output_ids) == "hello w"
    assert tokenizer.prompt_text([begin, *one, end]).replace("> ", ">") == "<s>hello</s>"
    offsets = offsets_of(tokenizer, [], output_ids)
    assert offsets[len(one)] == len("hello")  # the hidden one has the place of what follows
    assert offsets[-1] == len("hello w")
    shown = tokenizer.detokenizer([], skip_special_tokens=False)
    assert "".join(pieces_of(shown, output_ids, 2)) == library.decode(output_ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_at_the_seam_ends_the_character(kind):
    tokenizer, library = OURS[kind], LIBRARY[kind]
    end = library.token_to_id("</s>")
    (lead,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe6"]
    (letter,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"b"][-1:]
    assert tokenizer.prompt_text([lead, end]) == "\ufffd</s>"
    assert after(tokenizer, [lead, end], [letter]) == "b"


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_the_text_they_were_added_as(kind):
    ids = LIBRARY[kind].encode("a<né>b", add_special_tokens=False).ids
    assert LIBRARY[kind].token_to_id("<né>") in ids
    assert after(OURS[kind], [], ids) == OURS[kind].decode(ids)
    assert "a<né>" in OURS[kind].decode(ids)
    assert OURS[kind].token_text(LIBRARY[kind].token_to_id("<né>")) == "<né>"


def test_a_long_prompt_costs_no_more_than_its_end(monkeypatch):
    looked_at = []
    for kind, tokenizer in OURS.items():
        is_shown, partial = TextTokenizer.is_shown, TextTokenizer.partial_token_bytes
        ids = LIBRARY[kind].encode("hello 日本 " * 500, add_special_tokens=False).ids
        with monkeypatch.context() as patch:
            patch.setattr(TextTokenizer, "is_shown", lambda *a, f=is_shown, **k: looked_at.append(1) or f(*a, **k))
            patch.setattr(TextTokenizer, "partial_token_bytes", lambda *a, f=partial: looked_at.append(1) or f(*a))
            tokenizer.detokenizer(ids)
    assert 0 < len(looked_at) < 60

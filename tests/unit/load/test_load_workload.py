"""Workload: the same seed gives the same requests, lengths and arrivals stay in their bounds, datasets are checked."""

import json
import random
from itertools import pairwise

import pytest

from afd.errors import ConfigError
from afd.load.workload import (
    LengthRange,
    arrival_times,
    load_prompts,
    random_chat_prompts,
    random_token_prompts,
    repeat_prompts,
)


def tokens(num, *, seed=0, purpose="measured", ratio=0.5, vocab_size=1600):
    lengths = LengthRange(20, ratio), LengthRange(10, ratio)
    return random_token_prompts(num, *lengths, vocab_size=vocab_size, seed=seed, purpose=purpose)


def test_prompts_follow_from_seed_purpose_and_index_only():
    assert tokens(5) == tokens(9)[:5]
    assert tokens(5) != tokens(5, seed=1)
    firsts = {prompt.content[0] for prompt in tokens(50)} | {
        prompt.content[0] for prompt in tokens(50, purpose="warm-up")
    }
    assert len(firsts) > 80  # no shared prefixes


def test_ids_stay_away_from_both_ends_of_the_vocabulary():
    ids = [token for prompt in tokens(200) for token in prompt.content]
    assert min(ids) >= 100
    assert max(ids) < 1500
    assert len(set(ids)) > 900
    assert {token for prompt in tokens(20, vocab_size=1) for token in prompt.content} == {0}


def test_lengths_cover_their_range():
    prompts = tokens(300)
    assert {prompt.num_tokens for prompt in prompts} == set(range(10, 31))
    assert {prompt.output_len for prompt in prompts} == set(range(5, 16))
    assert all(len(prompt.content) == prompt.num_tokens for prompt in prompts)
    assert {prompt.num_tokens for prompt in tokens(20, ratio=0.0)} == {20}
    assert LengthRange(1, 0.9).sample(random.Random(0)) == 1


def test_chat_prompts_are_messages():
    lengths = LengthRange(7), LengthRange(3)
    prompt = random_chat_prompts(2, *lengths, seed=0, purpose="measured")[1]
    assert prompt.content[0]["role"] == "user"
    assert len(prompt.content[0]["content"].split()) == 7
    assert (prompt.num_tokens, prompt.output_len) == (0, 3)


def test_arrivals_have_the_rate_and_the_spread_asked_for():
    def gaps(burstiness):
        times = arrival_times(4000, 20.0, burstiness, seed=3)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(200)
        return [later - earlier for earlier, later in pairwise(times)]

    def variation(values):  # squared coefficient: 1 for a Poisson process, 1/shape for gamma gaps
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values) / mean**2

    assert variation(gaps(1.0)) == pytest.approx(1.0, rel=0.1)
    assert variation(gaps(0.25)) == pytest.approx(4.0, rel=0.2)
    assert variation(gaps(100.0)) == pytest.approx(0.01, rel=0.1)
    assert arrival_times(3, 1.0, 1.0, seed=1) != arrival_times(3, 1.0, 1.0, seed=2)
    assert arrival_times(1, 4.0, 1.0, seed=1) == [0.25]


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_dataset_forms(tmp_path):
    path = write(tmp_path, "one", [1, 2, 3], b"", {"prompt": "two", "output_len": 5}, {"prompt": [4], "max_tokens": 6})
    prompts = load_prompts(path, 9, chat=False)
    assert [prompt.content for prompt in prompts] == ["one", [1, 2, 3], "two", [4]]
    assert [prompt.output_len for prompt in prompts] == [9, 9, 5, 6]
    assert [prompt.num_tokens for prompt in prompts] == [0, 3, 0, 1]
    messages = [{"role": "system", "content": "s"}]
    prompts = load_prompts(write(tmp_path, "hi", {"messages": messages}), 9, chat=True)
    assert [prompt.content for prompt in prompts] == [[{"role": "user", "content": "hi"}], messages]


@pytest.mark.parametrize(
    ("line", "chat", "reason"),
    [
        (b"{", False, "line 2"),
        (b"\xff", False, "line 2"),
        (b"7", False, "neither a prompt"),
        ({"prompt": ""}, False, "neither a prompt"),
        ({"prompt": [1, "x"]}, False, "neither a prompt"),
        ({"prompt": [True]}, False, "neither a prompt"),
        ({"prompt": "x", "output_len": 0}, False, "output_len is 0"),
        ({"prompt": "x", "output_len": "9"}, False, "output_len is '9'"),
        ({"messages": [{"role": "user", "content": "x"}]}, False, "--endpoint chat"),
        ({"messages": []}, True, "not a list of messages"),
        ([1, 2], True, "--endpoint completions"),
    ],
)
def test_dataset_errors_name_the_line(tmp_path, line, chat, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        load_prompts(write(tmp_path, "fine", line), 9, chat=chat)
    assert "line 2" in str(caught.value)


def test_missing_and_empty_datasets(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_prompts(tmp_path / "none", 9, chat=False)
    with pytest.raises(ConfigError, match="no prompts"):
        load_prompts(write(tmp_path, b"", b"  "), 9, chat=False)


def test_a_short_dataset_is_repeated(tmp_path):
    prompts = load_prompts(write(tmp_path, "a", "b"), 9, chat=False)
    assert [prompt.content for prompt in repeat_prompts(prompts, 5)] == ["a", "b", "a", "b", "a"]

"""What is sent and when: prompts, lengths, arrival times. Pure but for `load_prompts`; all follows from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from afd.errors import ConfigError

# For a server that does not say how large its vocabulary is: ids that practically every model has.
ASSUMED_VOCAB_SIZE = 32_000
# Special tokens sit at either end of a vocabulary (Llama 3: the last 256, DeepSeek: the last 1280, Tekken: the first
# 1000, Gemma: the last 6144). Random prompts keep this share of it away from both ends.
_MARGIN_SHARE = 16
MAX_DATASET_BYTES = 256 << 20
# Chat prompts of random content: short common words, about one token each in every vocabulary.
_COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city name team minute idea body back parent face level office door health person art"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks.

    content: text or token ids (completions), messages (chat).
    num_tokens: as far as known here; 0 = only the server can count them.
    """

    content: Any
    num_tokens: int
    output_len: int


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Uniform over the whole numbers in [mean * (1 - ratio), mean * (1 + ratio)], at least 1."""

    mean: int
    ratio: float = 0.0

    def sample(self, rng: random.Random) -> int:
        low = max(1, int(self.mean * (1 - self.ratio)))
        return rng.randint(low, max(low, int(self.mean * (1 + self.ratio))))


def random_token_prompts(
    num_prompts: int, input_len: LengthRange, output_len: LengthRange, *, vocab_size: int, seed: int, purpose: str
) -> list[Prompt]:
    """Prompts of ordinary token ids, for servers with or without a tokenizer.

    Prompt i depends on (seed, purpose, i) only: a longer run starts with the prompts of a shorter one, and warm-up
    prompts share no prefix with measured ones.
    """
    margin = vocab_size // _MARGIN_SHARE
    ids = range(margin, vocab_size - margin)
    if not ids:
        raise ConfigError(f"a vocabulary of {vocab_size} has no ordinary token ids: check --vocab-size")
    prompts = []
    for prompt_idx in range(num_prompts):
        rng = random.Random(f"{seed}/{purpose}/{prompt_idx}")
        num_tokens = input_len.sample(rng)
        prompts.append(Prompt(rng.choices(ids, k=num_tokens), num_tokens, output_len.sample(rng)))
    return prompts


def random_chat_prompts(
    num_prompts: int, input_len: LengthRange, output_len: LengthRange, *, seed: int, purpose: str
) -> list[Prompt]:
    """One user message of random words each. The server's usage says how many tokens they and the template are."""
    vocabulary = _COMMON_WORDS.split()
    prompts = []
    for prompt_idx in range(num_prompts):
        rng = random.Random(f"{seed}/{purpose}/{prompt_idx}")
        words = rng.choices(vocabulary, k=input_len.sample(rng))
        prompts.append(Prompt([{"role": "user", "content": " ".join(words)}], 0, output_len.sample(rng)))
    return prompts


def load_prompts(path: Path, output_len: int, *, chat: bool) -> list[Prompt]:
    """A JSON-lines file: each line a text, a list of token ids, or an object.

    Objects: {"prompt": text or ids} or {"messages": [...]}, optionally with "output_len" (or "max_tokens"), which
    overrides `output_len`. ConfigError names the line that is wrong.
    """
    try:
        if path.stat().st_size > MAX_DATASET_BYTES:
            raise ConfigError(f"dataset {path} is larger than {MAX_DATASET_BYTES >> 20} MiB")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"dataset {path}: {error.strerror}; --dataset is 'random' or a JSON-lines file") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_parse_line(line, output_len, chat=chat))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"dataset {path}, line {number}: {error}") from None
    if not prompts:
        raise ConfigError(f"dataset {path} has no prompts")
    return prompts


def _parse_line(line: bytes, output_len: int, *, chat: bool) -> Prompt:
    """ValueError says what is wrong."""
    entry = msgspec.json.decode(line)
    if not isinstance(entry, dict):
        entry = {"prompt": entry}
    length = entry.get("output_len", entry.get("max_tokens", output_len))
    if type(length) is not int or length < 1:
        raise ValueError(f"output_len is {length!r}, not a positive whole number")
    content: Any = entry.get("messages")
    if content is not None:
        if not isinstance(content, list) or not content:
            raise ValueError("messages is not a list of messages")
        if not chat:
            raise ValueError("messages need --endpoint chat")
        return Prompt(content, 0, length)
    content = entry.get("prompt")
    if isinstance(content, str) and content:
        return Prompt([{"role": "user", "content": content}] if chat else content, 0, length)
    if isinstance(content, list) and content and all(type(item) is int for item in content):
        if chat:
            raise ValueError("token ids need --endpoint completions")
        return Prompt(content, len(content), length)
    raise ValueError("neither a prompt (text or token ids) nor messages")


def repeat_prompts(prompts: list[Prompt], num_prompts: int) -> list[Prompt]:
    """The first `num_prompts`, from the start again where the file is shorter (a prefix cache will notice)."""
    return [prompts[prompt_idx % len(prompts)] for prompt_idx in range(num_prompts)]


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request of an open loop is due; non-decreasing.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate: 1 = Poisson process, below = bursts, above =
    more even. They are scaled so that the last request is due after exactly num_requests / rate: the offered rate is
    then the one asked for, whatever the seed (as `vllm bench serve` does it).
    """
    rng = random.Random(f"{seed}/arrivals")
    times = list(accumulate(rng.gammavariate(burstiness, 1.0) for _ in range(num_requests)))
    scale = num_requests / rate / (times[-1] or 1.0)
    return [time * scale for time in times]

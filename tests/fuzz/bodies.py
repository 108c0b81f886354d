"""Valid bodies of every route that takes one, and their mutations: of the value, of the JSON text, of the bytes."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.mutations import mutate_bytes, mutate_value

BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_text", "text": "y"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
                {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f", "reasoning_content": "r"},
            ],
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "n": 2,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1, "7": -100},
            "seed": 3,
            "chat_template_kwargs": {"mode": "plain", "depth": [1, {"a": 2}]},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_completion_tokens": 4,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.2,
            "min_tokens": 1,
            "priority": -2,
            "response_format": {"type": "text"},
            "tools": [],
            "tool_choice": "none",
            "user": "me",
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": True,
            "continue_final_message": True,
            "structured_outputs": None,
            "length_penalty": 1.0,
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": [1, 2, 3],
            "max_tokens": 3,
            "logprobs": 1,
            "echo": False,
            "min_tokens": 1,
            "stop_token_ids": [4],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
        },
    ),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 2, "n": 2, "return_token_ids": True, "stream": True}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "echo": True, "best_of": 1, "suffix": ""}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True, "add_special_tokens": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True, "tools": []}),
    ("/detokenize", {"tokens": [1, 2, 3], "model": "tiny"}),
)
_ODD_TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "0x10", "01", "+1", "1.", ".5",
    '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x"', "'a'", "tru", "null null", "[" * 1500, '{"a":' * 1500, "{}}",
    "[1,]", "// c", "\ufeff1", "-0", "1E+2",
)  # fmt: skip


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """(path, body): none to a few changes."""
    path, value = rng.choice(BODIES)
    if rng.random() < 0.03:
        path = rng.choice(BODIES)[0]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        value = mutate_value(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:
        text = mutated_text(rng, text)
    body = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        body = mutate_bytes(rng, body)
    if rng.random() < 0.02:
        body = text.encode(rng.choice(("utf-16", "utf-32", "utf-7")), "replace")
    return path, body


def mutated_text(rng: random.Random, text: str) -> str:
    """What no JSON writer writes: odd literals, doubled keys, unfinished nesting."""
    commas = [at for at, char in enumerate(text) if char in ",:"]
    if not commas:
        return rng.choice(_ODD_TEXTS)
    at = rng.choice(commas)
    if rng.random() < 0.2:
        return text.rstrip("}") + ", " + text.lstrip("{")  # every key twice
    odd = rng.choice(_ODD_TEXTS)
    if rng.random() < 0.2:
        depth = rng.randrange(850, 1050)  # about as deep as the parser goes, and deeper than some writers
        odd = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    end = next((other for other in commas if other > at), len(text) - 1)
    return text[: at + 1] + odd + text[end:]

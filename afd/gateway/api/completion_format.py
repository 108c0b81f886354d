"""Answers of /v1/completions: text, or token ids alone where the model has no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from afd.gateway.dialect import Choice, clamp_logprob, json
from afd.gateway.sequence import Delta
from afd.gateway.tokenizer import TextOffsets, TextTokenizer


class CompletionFormat:
    """Implements `ResponseFormat` for one request."""

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        tokenizer: TextTokenizer | None,
        *,
        prompts: list[list[int]],
        num_choices: int,
        num_logprobs: int,
        include_usage: bool,
        return_token_ids: bool,
        echoed: list[str] | None,
        tokens_as_ids: bool = False,
        skip_special_tokens: bool = True,
    ):
        """num_logprobs: -1 = none.
        echoed: the prompts' texts, to be put before the output; None = not asked for.

        tokens_as_ids: tokens of log-probabilities are called "token_id:5".
        skip_special_tokens: the text is without.
        """
        self._envelope = {"id": response_id, "object": "text_completion", "created": created, "model": model}
        self._head = b"data: " + json(self._envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._num_choices = num_choices
        self._num_logprobs = num_logprobs
        self._return_token_ids = return_token_ids
        self._echoed = echoed
        self._tokens_as_ids = tokens_as_ids
        self._skip_special_tokens = skip_special_tokens
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def chunk(self, delta: Delta, usage: dict[str, Any] | None) -> bytes:
        wants_tokens = self._return_token_ids or self._num_logprobs >= 0
        text = delta.text
        if self._echoed is not None and delta.choice_idx not in self._begun:
            text = self._echoed[delta.choice_idx // self._num_choices] + text
        self._begun.add(delta.choice_idx)
        if not text and delta.finish is None and not (wants_tokens and delta.ids):
            return b""
        parts = [self._head, b'{"index":', json(delta.choice_idx), b',"text":', json(text)]
        parts += [b',"logprobs":', json(self.logprobs(delta))]
        parts += [b',"finish_reason":', json(delta.finish)]
        if delta.stop_reason is not None:
            parts += [b',"stop_reason":', json(delta.stop_reason)]
        if self._return_token_ids:
            parts += [b',"token_ids":', json(delta.ids)]
        parts.append(b"}")
        parts.append(self._tail if usage is None else b'],"usage":' + json(usage) + b"}\n\n")
        return b"".join(parts)

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        return self._head + b'],"usage":' + json(usage) + b"}\n\n"

    def body(self, choices: list[Choice], usage: dict[str, Any]) -> bytes:
        answer: dict[str, Any] = {**self._envelope, "choices": [self._choice(choice) for choice in choices]}
        answer["usage"] = usage
        return json(answer)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        prompt_idx = choice.index // self._num_choices
        echo = self._echoed[prompt_idx] if self._echoed is not None else ""
        logprobs = None
        if self._num_logprobs >= 0:
            logprobs = choice.logprobs()
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": echo + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }
        if choice.stop_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        if self._return_token_ids:
            entry["token_ids"] = choice.ids
            entry["prompt_token_ids"] = self._prompts[prompt_idx]
        return entry

    def logprobs(self, delta: Delta) -> dict[str, list[Any]] | None:
        """OpenAI's parallel lists. The sampled token is always among `top_logprobs`."""
        if self._num_logprobs < 0:
            return None
        place = self._place(delta.choice_idx)
        tokens, token_logprobs, tops, offsets = [], [], [], []
        for token_id, entry in zip(delta.ids, delta.logprobs, strict=False):
            tokens.append(self._key(token_id))
            token_logprobs.append(clamp_logprob(entry.logprob))
            top = {self._key(i): clamp_logprob(logprob) for i, logprob in entry.top[: self._num_logprobs]}
            top.setdefault(tokens[-1], token_logprobs[-1])
            tops.append(top)
            offsets.append(place(token_id))
        return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _place(self, choice_idx: int) -> Callable[[int], int]:
        """What gives the place of a choice's next token in its text; 0 where there is no text."""
        if self._tokenizer is None:
            return lambda token_id: 0
        offsets = self._offsets.get(choice_idx)
        if offsets is None:
            prompt_ids = self._prompts[choice_idx // self._num_choices]
            skip_special = self._skip_special_tokens
            offsets = TextOffsets(self._tokenizer.detokenizer(prompt_ids, skip_special_tokens=skip_special))
            self._offsets[choice_idx] = offsets
        return offsets.next

    def _key(self, token_id: int) -> str:
        """A token's text; its bytes, spelled out, where they are no whole character; its id without a tokenizer."""
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        if self._tokenizer is None:
            return str(token_id)
        token_bytes = self._tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

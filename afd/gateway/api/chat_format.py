"""Answers of /v1/chat/completions. Chunks are put together by hand: they are the gateway's hot path."""

from __future__ import annotations

from typing import Any

from afd.gateway.dialect import Choice, clamp_logprob, json
from afd.gateway.sequence import Delta
from afd.gateway.tokenizer import TextTokenizer


class ChatFormat:
    """Implements `ResponseFormat` for one request."""

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        tokenizer: TextTokenizer,
        *,
        prompt_ids: list[int],
        top_logprobs: int,
        include_usage: bool,
        return_token_ids: bool,
        tokens_as_ids: bool = False,
        skip_special_tokens: bool = True,
    ):
        """top_logprobs: -1 = no log-probabilities.
        include_usage: chunks carry "usage" (null until the last).

        tokens_as_ids: tokens of log-probabilities are called "token_id:5".
        skip_special_tokens: the text is without.
        """
        self._envelope = {"id": response_id, "object": "chat.completion", "created": created, "model": model}
        chunk_envelope = json({**self._envelope, "object": "chat.completion.chunk"})
        self._head = b"data: " + chunk_envelope[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._top_logprobs = top_logprobs
        self._return_token_ids = return_token_ids
        self._tokens_as_ids = tokens_as_ids
        self._bytes_of = tokenizer.shown_bytes if skip_special_tokens else tokenizer.token_bytes
        self._begun: set[int] = set()

    def chunk(self, delta: Delta, usage: dict[str, Any] | None) -> bytes:
        wants_tokens = self._return_token_ids or self._top_logprobs >= 0
        if not delta.text and delta.finish is None and not (wants_tokens and delta.ids):
            return b""
        parts = [self._head, b'{"index":', json(delta.choice_idx), b',"delta":{']
        if delta.choice_idx not in self._begun:
            self._begun.add(delta.choice_idx)
            parts.append(b'"role":"assistant",')
        parts += [b'"content":', json(delta.text), b'},"logprobs":']
        parts.append(json(self.logprobs(delta)))
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
        if self._return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids
        return json(answer)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": None if self._top_logprobs < 0 else choice.logprobs(),
            "finish_reason": choice.finish,
        }
        if choice.stop_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        if self._return_token_ids:
            entry["token_ids"] = choice.ids
        return entry

    def logprobs(self, delta: Delta) -> dict[str, list[Any]] | None:
        """OpenAI's list of tokens, each with its alternatives."""
        if self._top_logprobs < 0:
            return None
        content = []
        for token_id, entry in zip(delta.ids, delta.logprobs, strict=False):
            token = self._token(token_id, entry.logprob)
            token["top_logprobs"] = [self._token(i, logprob) for i, logprob in entry.top[: self._top_logprobs]]
            content.append(token)
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """bytes: what the token adds to the text, nothing for a special token; all tokens' bytes make the text."""
        return {
            "token": f"token_id:{token_id}" if self._tokens_as_ids else self._tokenizer.token_text(token_id),
            "logprob": clamp_logprob(logprob),
            "bytes": list(self._bytes_of(token_id)),
        }

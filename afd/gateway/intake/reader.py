"""One request's body, read whole: bytes in, a checked job or a finished answer out. Pure; slow where the body is long.

Counts are looked at before the work that they cause: prompts before any is tokenised, messages before the template
runs, tokens while they are made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from afd.config import GatewayConfig
from afd.errors import RequestError
from afd.gateway.api.continuation import up_to_mark, with_mark
from afd.gateway.api.parameters import (
    CONTEXT_EXCEEDED,
    chat_job,
    check_num_messages,
    check_num_sequences,
    check_token_ids,
    completion_job,
    max_prompt_chars,
    max_prompt_tokens,
    split_prompts,
    template_messages,
    too_long,
)
from afd.gateway.api.schema import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    SamplingBody,
    StreamOptions,
    TokenizeBody,
    chat_decoder,
    completion_decoder,
    detokenize_decoder,
    tokenize_decoder,
)
from afd.gateway.generation import GenerationJob
from afd.gateway.intake.encoding import TooManyTokensError, TooSlowError, encode_bounded
from afd.gateway.served_model import ServedModel

BodyT = TypeVar("BodyT", bound=SamplingBody)
_SMALL = (bool, int, float, StreamOptions, type(None))


class RawRequest(msgspec.Struct, array_like=True, frozen=True):
    """A request as it came.

    headers: those that a job depends on.
    max_context: tokens that a request can have at this moment.
    """

    route: str
    body: bytes
    headers: dict[str, str]
    max_context: int


class Prepared(msgspec.Struct):
    """A job with the small fields of its body (the others are None), or an answer that is complete already (JSON).

    echoed: the prompts' texts where they were asked for.
    """

    body: ChatBody | CompletionBody | None = None
    job: GenerationJob | None = None
    echoed: list[str] | None = None
    answer: bytes = b""


class RequestReader:
    """Bound to one model and the gateway's limits. Any thread."""

    def __init__(self, model: ServedModel, limits: GatewayConfig):
        self._model = model
        self._limits = limits
        self._routes = {
            "chat": self._chat,
            "completions": self._completions,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }

    def read(self, request: RawRequest) -> Prepared:
        """RequestError when the request is refused."""
        model = self._model
        if request.max_context != model.max_context:
            model = replace(model, max_context=request.max_context)
        return self._routes[request.route](request, model)

    def _chat(self, request: RawRequest, model: ServedModel) -> Prepared:
        body = chat_decoder.decode(request.body)
        model.check_name(body.model)
        text, special = self._templated(body, model), bool(body.add_special_tokens)
        (prompt_ids,) = self._encode([text], model, "messages", special=special)
        job = chat_job(body, prompt_ids, request.headers, model, self._limits)
        return Prepared(_small_fields(body, messages=[ChatMessage("user")]), job)

    def _completions(self, request: RawRequest, model: ServedModel) -> Prepared:
        body = completion_decoder.decode(request.body)
        model.check_name(body.model)
        if isinstance(body.prompt, list) and not isinstance(next(iter(body.prompt), 0), int):
            check_num_sequences(body, len(body.prompt), self._limits)  # before as much as a look at each
        given = split_prompts(body.prompt)
        check_num_sequences(body, len(given), self._limits)
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        if texts:
            prompts = self._encode(texts, model, "prompt", special=body.add_special_tokens is not False)
        else:
            prompts = [prompt for prompt in given if not isinstance(prompt, str)]
        job = completion_job(body, prompts, request.headers, model, self._limits)
        echoed = None
        if body.echo:
            prompt_text = model.need_tokenizer("echo").prompt_text
            echoed = [prompt if isinstance(prompt, str) else prompt_text(prompt) for prompt in given]
        return Prepared(_small_fields(body, prompt=""), job, echoed)

    def _tokenize(self, request: RawRequest, model: ServedModel) -> Prepared:
        body = tokenize_decoder.decode(request.body)
        model.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            (ids,) = self._encode([body.prompt], model, "prompt", special=special)
        else:
            special = bool(body.add_special_tokens)
            (ids,) = self._encode([self._templated(body, model)], model, "messages", special=special)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}
        if body.return_token_strs:
            tokenizer = model.need_tokenizer("return_token_strs")
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids]
        return Prepared(answer=msgspec.json.encode(answer))

    def _detokenize(self, request: RawRequest, model: ServedModel) -> Prepared:
        body = detokenize_decoder.decode(request.body)
        model.check_name(body.model)
        tokenizer = model.need_tokenizer("tokens")
        num_most = max_prompt_tokens(model, self._limits)
        if len(body.tokens) > num_most:
            raise RequestError(f"{len(body.tokens)} tokens; at most {num_most}", param="tokens")
        check_token_ids(body.tokens, model, "tokens")
        text = tokenizer.decode(body.tokens, skip_special_tokens=False)
        return Prepared(answer=msgspec.json.encode({"prompt": text}))

    def _templated(self, body: ChatBody | TokenizeBody, model: ServedModel) -> str:
        assert body.messages is not None
        template = model.need_template()
        check_num_messages(body.messages, model)
        messages, goes_on = template_messages(body.messages), bool(body.continue_final_message)
        if goes_on and body.add_generation_prompt:
            raise RequestError("add_generation_prompt begins another message", param="continue_final_message")
        max_chars = max_prompt_chars(model, "messages")
        try:
            text = template.render(
                with_mark(messages) if goes_on else messages,
                max_chars=max_chars,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt is not False and not goes_on,
                extra=body.chat_template_kwargs,
            )
        except RequestError as error:
            if error.code != CONTEXT_EXCEEDED:
                raise
            raise too_long(f"more than {max_chars} characters", model, "messages") from error
        return up_to_mark(text) if goes_on else text

    def _encode(self, texts: list[str], model: ServedModel, param: str, *, special: bool) -> list[list[int]]:
        """Tokens of each text: each may fill the context, all together as much as one request may have."""
        tokenizer = model.need_tokenizer(param)
        num_left = max_prompt_tokens(model, self._limits)
        prompts = []
        for text in texts:
            try:
                ids = encode_bounded(tokenizer, text, min(num_left, model.max_context), add_special_tokens=special)
            except TooManyTokensError as error:
                limit = min(num_left, model.max_context)
                if limit == model.max_context:
                    raise too_long(str(error), model, param) from error
                num_most = max_prompt_tokens(model, self._limits)
                raise RequestError(
                    f"the prompts together have more than {num_most} tokens (gateway.max_request_tokens)", param=param
                ) from error
            except TooSlowError as error:
                raise RequestError(f"{len(text)} characters take too long to tokenise", param=param) from error
            num_left -= len(ids)
            prompts.append(ids)
        return prompts


def _small_fields(body: BodyT, **stubs: Any) -> BodyT:
    """A copy without what is already in the job: only flags and numbers are left."""
    fields = {name: getattr(body, name) for name in body.__struct_fields__}
    small = {name: value if isinstance(value, _SMALL) else None for name, value in fields.items()}
    return type(body)(**{**small, **stubs})

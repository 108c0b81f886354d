"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models; /tokenize and /detokenize beside them."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afd.errors import RequestError
from afd.gateway.api.answers import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    DetokenizedText,
    ModelCard,
    ModelList,
    Tokens,
)
from afd.gateway.api.chat_format import ChatFormat
from afd.gateway.api.completion_format import CompletionFormat
from afd.gateway.api.continuation import up_to_mark, with_mark
from afd.gateway.api.formats import ResponseFormat, json
from afd.gateway.api.openapi import answers, path_parameter, takes
from afd.gateway.api.parameters import (
    CONTEXT_EXCEEDED,
    chat_job,
    check_prompt_chars,
    check_token_ids,
    completion_job,
    max_prompt_chars,
    split_prompts,
    template_messages,
    too_long,
)
from afd.gateway.api.schema import (
    ChatBody,
    SamplingBody,
    TokenizeBody,
    chat_decoder,
    completion_decoder,
    detokenize_decoder,
    tokenize_decoder,
)
from afd.gateway.body import read_body
from afd.gateway.generation import GenerationJob
from afd.gateway.served_model import ServedModel
from afd.gateway.service import GatewayService
from afd.gateway.stream import GenerationResponse

INLINE_ENCODE_CHARS = 8_192  # longer texts are tokenised in a thread: the event loop has streams to serve


class _Reply(Response):
    """Hands the connection to a `GenerationResponse` (FastAPI wants a Response from a route)."""

    def __init__(self, inner: GenerationResponse):
        super().__init__()
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inner(scope, receive, send)


class OpenAiRoutes:
    """Handlers bound to one service."""

    def __init__(self, service: GatewayService):
        self._service = service
        self._limits = service.config.gateway

    @property
    def _model(self) -> ServedModel:
        return self._service.model

    def install(self, app: FastAPI) -> None:
        def add(method: str, path: str, handler: Any, described: dict[str, Any]) -> None:
            app.add_api_route(path, handler, methods=[method], response_model=None, **described)

        add("POST", "/v1/chat/completions", self.chat, takes(chat_decoder, ChatAnswer, events=ChatChunk))
        completions = takes(completion_decoder, CompletionAnswer, events=CompletionChunk)
        add("POST", "/v1/completions", self.completions, completions)
        add("POST", "/tokenize", self.tokenize, takes(tokenize_decoder, Tokens))
        add("POST", "/detokenize", self.detokenize, takes(detokenize_decoder, DetokenizedText))
        add("GET", "/v1/models", self.models, answers(ModelList))
        card = answers(ModelCard, errors=(404,))
        card["openapi_extra"]["parameters"] = [path_parameter("model_name", "Any of the model's names")]
        add("GET", "/v1/models/{model_name:path}", self.model, card)

    # --- generation -------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Chat completion, streamed or not."""
        body = chat_decoder.decode(await read_body(request, self._limits.max_body_bytes))
        self._model.check_name(body.model)
        text = await self._prompt_text(body)
        (prompt_ids,) = await self._encode([text], "messages", add_special_tokens=bool(body.add_special_tokens))
        job = chat_job(body, prompt_ids, request.headers, self._model, self._limits)
        response_format = ChatFormat(
            f"chatcmpl-{request.state.request_id}",
            int(time.time()),
            self._model.name,
            self._model.need_tokenizer("messages"),
            prompt_ids=prompt_ids,
            top_logprobs=job.prompts[0][1].logprobs,
            include_usage=_include_usage(body),
            return_token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            skip_special_tokens=job.skip_special_tokens,
        )
        return self._reply(body, job, response_format)

    async def completions(self, request: Request) -> Response:
        """Text completion of one or several prompts, given as texts or as token ids."""
        body = completion_decoder.decode(await read_body(request, self._limits.max_body_bytes))
        self._model.check_name(body.model)
        given = split_prompts(body.prompt)
        prompts = await self._prompt_ids(given, add_special_tokens=body.add_special_tokens is not False)
        job = completion_job(body, prompts, request.headers, self._model, self._limits)
        tokenizer = self._model.tokenizer
        echoed = None
        if body.echo:
            prompt_text = self._model.need_tokenizer("echo").prompt_text
            echoed = [prompt if isinstance(prompt, str) else prompt_text(prompt) for prompt in given]
        response_format = CompletionFormat(
            f"cmpl-{request.state.request_id}",
            int(time.time()),
            self._model.name,
            tokenizer,
            prompts=prompts,
            num_choices=job.num_choices,
            num_logprobs=job.prompts[0][1].logprobs,
            include_usage=_include_usage(body),
            return_token_ids=tokenizer is None if body.return_token_ids is None else body.return_token_ids,
            echoed=echoed,
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            skip_special_tokens=job.skip_special_tokens,
        )
        return self._reply(body, job, response_format)

    def _reply(self, body: SamplingBody, job: GenerationJob, response_format: ResponseFormat) -> Response:
        options = body.stream_options
        response = GenerationResponse(
            self._service.generate(job),
            response_format,
            self._service.metrics,
            num_choices=job.num_choices,
            stream=bool(body.stream),
            include_usage=_include_usage(body),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )
        return _Reply(response)

    async def _prompt_text(self, body: ChatBody | TokenizeBody) -> str:
        """Messages through the chat template, off the event loop: a template is a program."""
        assert body.messages is not None
        messages, goes_on = template_messages(body.messages), bool(body.continue_final_message)
        if goes_on and body.add_generation_prompt:
            raise RequestError("add_generation_prompt begins another message", param="continue_final_message")
        max_chars = max_prompt_chars(self._model, "messages")
        render = functools.partial(
            self._model.need_template().render,
            with_mark(messages) if goes_on else messages,
            max_chars=max_chars,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt is not False and not goes_on,
            extra=body.chat_template_kwargs,
        )
        try:
            text = await asyncio.to_thread(render)
        except RequestError as error:
            if error.code != CONTEXT_EXCEEDED:
                raise
            raise too_long(f"more than {max_chars} characters", self._model, "messages") from error
        return up_to_mark(text) if goes_on else text

    async def _prompt_ids(self, prompts: list[str | list[int]], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each prompt."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts:
            return await self._encode(texts, "prompt", add_special_tokens=add_special_tokens)
        return [prompt for prompt in prompts if not isinstance(prompt, str)]

    async def _encode(self, texts: list[str], param: str, *, add_special_tokens: bool) -> list[list[int]]:
        """Off the event loop when it takes more than a moment."""
        tokenizer = self._model.need_tokenizer(param)
        for text in texts:
            check_prompt_chars(text, self._model, param)

        def encode_all() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) <= INLINE_ENCODE_CHARS:
            return encode_all()
        return await asyncio.to_thread(encode_all)

    # --- models and tokens ------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The one model served."""
        return _json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """One model by name."""
        self._model.check_name(request.path_params["model_name"])
        return _json_response(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or of templated messages."""
        body = tokenize_decoder.decode(await read_body(request, self._limits.max_body_bytes))
        self._model.check_name(body.model)
        ids = await self._tokenized(body)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self._model.max_context, "tokens": ids}
        if body.return_token_strs:
            tokenizer = self._model.need_tokenizer("return_token_strs")
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids]
        return _json_response(answer)

    async def _tokenized(self, body: TokenizeBody) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            (ids,) = await self._encode([body.prompt], "prompt", add_special_tokens=special)
            return ids
        text = await self._prompt_text(body)
        (ids,) = await self._encode([text], "messages", add_special_tokens=bool(body.add_special_tokens))
        return ids

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        body = detokenize_decoder.decode(await read_body(request, self._limits.max_body_bytes))
        self._model.check_name(body.model)
        tokenizer = self._model.need_tokenizer("tokens")
        check_token_ids(body.tokens, self._model, "tokens")
        return _json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "afd",
            "root": self._model.names[-1],
            "max_model_len": self._model.max_context,
            "vocab_size": self._model.vocab_size,
        }


def _include_usage(body: SamplingBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _json_response(value: object) -> Response:
    return Response(json(value), media_type="application/json")

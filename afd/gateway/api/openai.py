"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models; /tokenize and /detokenize beside them."""

from __future__ import annotations

import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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
from afd.gateway.api.openapi import answers, path_parameter, takes
from afd.gateway.api.parameters import own_ttft_s
from afd.gateway.api.schema import (
    SamplingBody,
    chat_decoder,
    completion_decoder,
    detokenize_decoder,
    tokenize_decoder,
)
from afd.gateway.body import read_body
from afd.gateway.dialect import ResponseFormat, json
from afd.gateway.generation import GenerationJob
from afd.gateway.intake.reader import Prepared
from afd.gateway.served_model import ServedModel
from afd.gateway.service import GatewayService
from afd.gateway.stream import GenerationResponse

log = logging.getLogger(__name__)
GENERATING = frozenset({"chat", "completions"})


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

    async def _read(self, route: str, request: Request) -> Prepared:
        client, headers = request.state.client, request.headers
        async with self._service.bodies.receive(client) as receipt:
            body = await read_body(request, self._limits.max_body_bytes, receipt)
            # Overload must not cost the reading of what will be refused. A body that may name its priority is read.
            if route in GENERATING and not any(word in body for word in (b"priority", b"\\u")):
                self._service.check_room(0, own_ttft_s(headers))
            context, intake = self._model.max_context, self._service.intake
            return await intake.read(route, body, headers, context, client, receipt.leave)

    async def chat(self, request: Request) -> Response:
        """Chat completion, streamed or not."""
        prepared = await self._read("chat", request)
        body, job = prepared.body, prepared.job
        assert body is not None and job is not None
        (prompt_ids, sampling), *_ = job.prompts
        response_format = ChatFormat(
            f"chatcmpl-{request.state.request_id}",
            int(time.time()),
            self._model.name,
            self._model.need_tokenizer("messages"),
            prompt_ids=prompt_ids,
            top_logprobs=sampling.logprobs,
            include_usage=_include_usage(body),
            return_token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            skip_special_tokens=job.skip_special_tokens,
        )
        return self._reply(request, body, job, response_format)

    async def completions(self, request: Request) -> Response:
        """Text completion of one or several prompts, given as texts or as token ids."""
        prepared = await self._read("completions", request)
        body, job = prepared.body, prepared.job
        assert body is not None and job is not None
        tokenizer = self._model.tokenizer
        response_format = CompletionFormat(
            f"cmpl-{request.state.request_id}",
            int(time.time()),
            self._model.name,
            tokenizer,
            prompts=[ids for ids, _ in job.prompts],
            num_choices=job.num_choices,
            num_logprobs=job.prompts[0][1].logprobs,
            include_usage=_include_usage(body),
            return_token_ids=tokenizer is None if body.return_token_ids is None else body.return_token_ids,
            echoed=prepared.echoed,
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            skip_special_tokens=job.skip_special_tokens,
        )
        return self._reply(request, body, job, response_format)

    def _reply(
        self, request: Request, body: SamplingBody, job: GenerationJob, response_format: ResponseFormat
    ) -> Response:
        options = body.stream_options
        generation = self._service.generate(job)
        log.debug("request %s is %s", request.state.request_id, " ".join(s.req_id for s in generation.sequences))
        response = GenerationResponse(
            generation,
            response_format,
            self._service.metrics,
            num_choices=job.num_choices,
            stream=bool(body.stream),
            include_usage=_include_usage(body),
            continuous_usage=bool(options and options.continuous_usage_stats),
        )
        return _Reply(response)

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
        return _json_bytes((await self._read("tokenize", request)).answer)

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        return _json_bytes((await self._read("detokenize", request)).answer)

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
    return _json_bytes(json(value))


def _json_bytes(data: bytes) -> Response:
    return Response(data, media_type="application/json")

"""Shapes of the answers, for the OpenAPI document. The answers themselves are put together in the formats and handlers,
and a test holds them against these."""

from __future__ import annotations

from typing import Any, Literal, Union

import msgspec
from msgspec import UNSET, UnsetType

from afd.gateway.errors import ApiError

FinishReason = Literal["stop", "length"]


class ErrorAnswer(msgspec.Struct):
    error: ApiError


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str


class Ending(msgspec.Struct, kw_only=True):
    """stop_reason: the stop string or the client's own stop token that ended it."""

    index: int
    stop_reason: Union[str, int, UnsetType] = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChoice(Ending, kw_only=True):
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str


class ChatChunkChoice(Ending, kw_only=True):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Union[Usage, UnsetType, None] = UNSET


class CompletionLogprobs(msgspec.Struct):
    """text_offset: where each token begins in the generated text, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChunkChoice(Ending, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(CompletionChunkChoice, kw_only=True):
    finish_reason: FinishReason
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionAnswer(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Union[Usage, UnsetType, None] = UNSET


class ModelCard(msgspec.Struct):
    """max_model_len: tokens of prompt and output together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    vocab_size: int


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizedText(msgspec.Struct):
    prompt: str


class Health(msgspec.Struct):
    status: Literal["ok"]


class Version(msgspec.Struct):
    version: str


class Member(msgspec.Struct, kw_only=True):
    """stats: of attention workers, what they report of their load."""

    role: str
    rank: int
    host: str
    ready: bool
    draining: bool
    serving: bool | UnsetType = UNSET
    stats: Union[dict[str, Any], UnsetType, None] = UNSET


class ClusterState(msgspec.Struct):
    """reason: why requests are not taken, null while they are."""

    model: str
    max_context: int
    topology: str
    ready: bool
    reason: str | None
    epoch: int
    queued: int
    running: int
    members: list[Member]


SHAPES = (
    ErrorAnswer,
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    ModelList,
    ModelCard,
    Tokens,
    DetokenizedText,
    Health,
    Version,
    ClusterState,
)

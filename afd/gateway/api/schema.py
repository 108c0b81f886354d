"""Request bodies as msgspec structs: decoded and checked in one pass.

Unknown fields are ignored, as vLLM does; fields of other servers that are known and not served are in `unsupported`.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from afd.errors import RequestError
from afd.gateway.api.unsupported import CHAT, COMPLETION, TOKENIZE, Fields, UnsupportedFields

T = TypeVar("T")

Text = str
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Positive = Annotated[int, Meta(ge=1, le=1 << 31)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
TokenIdField = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_FLOAT_FOR_INTEGER = re.compile(r"Expected `[^`]*\bint\b[^`]*`, got `float`")
Role = Annotated[str, Meta(pattern=r"^[\w.-]{1,64}$(?!\n)")]  # Python's $ matches before a last newline, too


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share. None = not given: each has its default in `parameters`."""

    model: str | None = None
    max_tokens: Positive | None = None
    n: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenIdField] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Probability | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, float] | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] | None = None
    response_format: dict[str, Any] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None


class ContentPart(msgspec.Struct):
    """One part of a message's content; only type "text" can be served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """role: any name that the chat template knows.  tool_calls and the like are handed to the template as they are."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatBody(SamplingBody, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """POST /v1/completions. prompt: a text, texts, one list of token ids, or several."""

    prompt: str | list[str | TokenIdField | list[TokenIdField]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: either prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    tokens: list[TokenIdField]
    model: str | None = None


class BodyDecoder(Generic[T]):
    """Bytes -> body of one type; RequestError (400) names the parameter."""

    def __init__(self, body_type: type[T], unsupported: Fields | None = None):
        """unsupported: fields that are refused unless their value asks for nothing."""
        self.body_type = body_type
        self.unsupported = UnsupportedFields(unsupported or {})
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(body_type)

    def decode(self, data: bytes) -> T:
        data = data.removeprefix(BOM_UTF8)  # some editors and shells put it there, and other servers pass over it
        try:
            try:
                body = self._decoder.decode(data)
            except msgspec.ValidationError as error:
                if not _FLOAT_FOR_INTEGER.match(str(error)):
                    raise
                body = msgspec.convert(_with_integers(data), self.body_type)
            self.unsupported.check(data)
            return body
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at `$")
            param = _full_path(path.removesuffix("`").removeprefix("."), message)
            where = f"{param}: " if param else ""
            raise RequestError(f"{where}{message}", param=param, code="invalid_value") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


def _with_integers(data: bytes) -> Any:
    """A body whose numbers like 4.0 are integers: many clients know one kind of number only."""

    def integral(value: Any) -> Any:
        if isinstance(value, list):
            return [integral(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return {name: integral(value) for name, value in msgspec.json.decode(data).items()}


def _full_path(path: str, message: str) -> str | None:
    """The parameter at fault. Of a missing field, the path names the parent and the message the field."""
    _, missing, name = message.partition("missing required field `")
    parts = [path, name.rstrip("`")] if missing else [path]
    return ".".join(part for part in parts if part) or None


chat_decoder = BodyDecoder(ChatBody, CHAT)
completion_decoder = BodyDecoder(CompletionBody, COMPLETION)
tokenize_decoder = BodyDecoder(TokenizeBody, TOKENIZE)
detokenize_decoder = BodyDecoder(DetokenizeBody)
DECODERS: tuple[BodyDecoder[Any], ...] = (chat_decoder, completion_decoder, tokenize_decoder, detokenize_decoder)

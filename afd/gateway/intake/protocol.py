"""What crosses between the gateway and a process that reads requests: frames of a length and MessagePack.

The first frame to the child is `Setup`; then each `RawRequest` gets a `Reply` and, behind it, the token ids of all its
prompts as 32-bit integers, which cost the gateway least.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec

from afd.config import GatewayConfig
from afd.errors import AfdError, RequestError
from afd.gateway.api.schema import ChatBody, CompletionBody
from afd.gateway.generation import GenerationJob
from afd.gateway.intake.reader import Prepared
from afd.gateway.served_model import ServedModel
from afd.gateway.templating import ChatTemplate
from afd.gateway.tokenizer import TextTokenizer

LENGTH = struct.Struct("!I")
MAX_FRAME_BYTES = 1 << 30
ID_BYTES = 4
_BODIES: dict[str, type[ChatBody | CompletionBody]] = {"chat": ChatBody, "completions": CompletionBody}


class Setup(msgspec.Struct, array_like=True):
    """A `ServedModel` and the limits, as values.

    model: without tokenizer and template, which come as text.

    tokenizer: its JSON, and whether it splits special tokens.
    """

    model: ServedModel
    tokenizer: tuple[str, bool] | None
    template: tuple[dict[str, str], dict[str, str]] | None
    limits: GatewayConfig

    @classmethod
    def of(cls, model: ServedModel, limits: GatewayConfig) -> Setup:
        template = None if model.template is None else (model.template.sources, model.template.special_tokens)
        tokenizer = None if model.tokenizer is None else (model.tokenizer.to_json(), model.tokenizer.splits_special)
        return cls(replace(model, tokenizer=None, template=None), tokenizer, template, limits)

    def restore(self, make_template: Callable[[dict[str, str], dict[str, str]], ChatTemplate]) -> ServedModel:
        """The model as it was; make_template: from sources and special tokens."""
        tokenizer = None
        if self.tokenizer is not None:
            text, splits_special = self.tokenizer
            tokenizer = TextTokenizer.from_json(text, splits_special=splits_special)
        return replace(
            self.model,
            tokenizer=tokenizer,
            template=None if self.template is None else make_template(*self.template),
        )


class Refusal(msgspec.Struct, array_like=True):
    """A RequestError as values."""

    message: str
    param: str | None
    code: str | None
    status: int

    @classmethod
    def of(cls, error: RequestError) -> Refusal:
        return cls(str(error), error.param, error.code, error.status)

    def error(self) -> RequestError:
        return RequestError(self.message, param=self.param, code=self.code, status=self.status)


class Reply(msgspec.Struct, array_like=True):
    """failed: the child could not read it, through a fault of ours.
    job: without its prompts' ids and with the first one's sampling parameters, of which only max_tokens differs between
    prompts.
    """

    refusal: Refusal | None = None
    failed: bool = False
    answer: bytes = b""
    body: bytes = b""
    job: GenerationJob | None = None
    max_tokens: list[int] = []
    lengths: list[int] = []
    echoed: list[str] | None = None


def pack(prepared: Prepared) -> tuple[Reply, bytes]:
    """A reply and the ids behind it."""
    if prepared.job is None:
        return Reply(answer=prepared.answer), b""
    prompts = prepared.job.prompts
    reply = Reply(
        body=msgspec.msgpack.encode(prepared.body),
        job=replace(prepared.job, prompts=[([], prompts[0][1])]),
        max_tokens=[sampling.max_tokens for _, sampling in prompts],
        lengths=[len(ids) for ids, _ in prompts],
        echoed=prepared.echoed,
    )
    return reply, b"".join(array.array("i", ids).tobytes() for ids, _ in prompts)


def unpack(route: str, reply: Reply, ids: memoryview) -> Iterator[Prepared | None]:
    """Unpack a reply in short steps: None after each, at the end what came."""
    if reply.refusal is not None:
        raise reply.refusal.error()
    if reply.failed:
        raise AfdError("the gateway could not read this request; its log has the details")
    if reply.job is None:
        yield Prepared(answer=reply.answer)
        return
    sampling, prompts, start = reply.job.prompts[0][1], [], 0
    for length, max_tokens in zip(reply.lengths, reply.max_tokens, strict=True):
        piece = array.array("i")
        piece.frombytes(ids[start : start + ID_BYTES * length])
        start += ID_BYTES * length
        prompts.append((piece.tolist(), replace(sampling, max_tokens=max_tokens)))
        yield None
    body = msgspec.msgpack.decode(reply.body, type=_BODIES[route])
    yield Prepared(body, replace(reply.job, prompts=prompts), reply.echoed)

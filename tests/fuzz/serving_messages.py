"""Valid messages between gateway and attention worker, and their mutations: of the value, then of the bytes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from afd.messages.codec import encode
from afd.messages.serving import (
    Abort,
    GatewayMessage,
    Lease,
    Refused,
    Resend,
    Submit,
    TokenChunk,
    TokenLogprobs,
    Tokens,
    WorkerMessage,
    WorkerStats,
)
from afd.types import FinishReason, SamplingParams
from tests.fuzz.mutations import mutate_bytes, mutate_value


def frame(rng: random.Random, message: GatewayMessage | WorkerMessage) -> bytes:
    """The message on the wire: as it is, with odd values, or with odd bytes."""
    raw = encode(message)
    kind = rng.random()
    if kind < 0.15:
        return raw
    if kind < 0.8:
        value = msgspec.msgpack.decode(raw)
        for _ in range(rng.choice((1, 1, 2))):
            value = mutate_value(rng, value)
        with contextlib.suppress(OverflowError):  # an integer that msgpack cannot carry
            return msgspec.msgpack.encode(value)
    return mutate_bytes(rng, raw)


def gateway_message(rng: random.Random, names: Sequence[str], vocab_size: int) -> GatewayMessage:
    """What a gateway could say about one of a few requests."""
    name, attempt = rng.choice(names), rng.randrange(3)
    match rng.randrange(8):
        case 0:
            return Abort([name])
        case 1:
            return Resend(name, attempt, rng.randrange(4))
        case 2:
            return Lease("gw", 3.0, rng.choice((None, [name], list(names))))
        case _:
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 12))]
            output = [rng.randrange(vocab_size) for _ in range(rng.randrange(3))]
            return Submit(name, attempt, prompt, output, sampling(rng, vocab_size), rng.randrange(-1, 2), 1.0, 0.05)


def sampling(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Any valid parameters."""
    return SamplingParams(
        max_tokens=rng.randrange(4, 12),
        seed=rng.getrandbits(63),
        choice=rng.randrange(4),
        temperature=rng.choice((0.0, 0.7, 1.0, 100.0)),
        top_p=rng.choice((1.0, 0.5, 1e-9)),
        top_k=rng.choice((0, 1, 5, vocab_size * 2)),
        min_p=rng.choice((0.0, 0.2, 1.0)),
        stop_token_ids=tuple(rng.sample(range(vocab_size), rng.randrange(3))),
        min_tokens=rng.randrange(3),
        presence_penalty=rng.choice((0.0, 2.0, -2.0)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        repetition_penalty=rng.choice((1.0, 1.3, 0.01)),
        logit_bias=((rng.randrange(vocab_size), rng.choice((-100.0, 5.0))),) * rng.randrange(2),
        logprobs=rng.choice((-1, 0, 3, 20)),
    )


def worker_message(rng: random.Random, submit: Submit | None, vocab_size: int) -> WorkerMessage:
    """What a worker could say about a request of this gateway's, or about itself."""
    if submit is None or rng.random() < 0.15:
        fields: dict[str, Any] = stats_fields(rng)
        return WorkerStats(**fields)
    if rng.random() < 0.1:
        reason = rng.choice(("capacity", "draining", "not_ready", "invalid", "unknown", "?"))
        return Refused(submit.req_id, submit.attempt, reason, "because", rng.choice((0.0, 0.01, 1.0)))
    chunks = []
    for _ in range(rng.randrange(1, 3)):
        ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(3))]
        logprobs = [TokenLogprobs(-0.5, [(token, -0.5), (1, -2.0)]) for token in ids]
        finish = rng.choice((None, None, None, None, None, *FinishReason))
        first_idx = len(submit.output_ids) + rng.randrange(4)
        error = "it broke" if finish is FinishReason.ERROR else None
        chunks.append(TokenChunk(submit.req_id, submit.attempt, first_idx, ids, logprobs, finish, error, True, 1, 1))
    return Tokens(chunks)


def stats_fields(rng: random.Random) -> dict[str, Any]:
    """Fields of a plausible load report."""
    stats = WorkerStats(0, rng.randrange(9), rng.randrange(3), 100, rng.randrange(100))
    return msgspec.structs.asdict(stats) | {"places_s": [0.5, 0.7][: rng.randrange(3)]}

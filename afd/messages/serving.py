"""Gateway <-> attention worker.

The worker binds a ROUTER socket, each gateway connects one DEALER per worker. Exact migration rests on three
rules: the gateway draws the seed; `Submit` carries what was already produced (`output_ids`) and an `attempt`
number; every `TokenChunk` carries (req_id, attempt, first_idx), so the gateway drops old attempts, sees gaps,
and asks again (`Resend`). A message lost on the way therefore loses nothing.
"""

from __future__ import annotations

from typing import Annotated, Union

import msgspec
from msgspec import Meta

from afd.config import ClusterConfig
from afd.errors import ConfigError
from afd.messages.codec import Decoder
from afd.types import FinishReason, SamplingParams

MAX_MESSAGE_BYTES = 64 << 20
_BASE_BYTES = 256 << 10  # all of a request but its tokens
_TOKEN_BYTES = 5
_REQUEST_ID_BYTES = 64


def to_worker_bytes(config: ClusterConfig, model_context: int) -> int:
    """Bytes of the longest message that an attention worker takes: a request as long as the context, or a list of all
    requests that it may have. ConfigError where that is above MAX_MESSAGE_BYTES.

    As many bytes can be held for each connection that has not authenticated yet.
    """
    context = min(model_context, config.model.max_context or model_context)
    num_requests = config.attention.max_num_seqs + config.attention.max_waiting
    room = MAX_MESSAGE_BYTES - _BASE_BYTES
    if _TOKEN_BYTES * context > room:
        raise ConfigError(
            f"a request of {context} tokens, which is the context here, does not fit a message to a worker "
            f"({MAX_MESSAGE_BYTES >> 20} MiB): set model.max_context to at most {room // _TOKEN_BYTES}"
        )
    if _REQUEST_ID_BYTES * num_requests > room:
        raise ConfigError(
            f"attention.max_num_seqs and max_waiting allow {num_requests} requests, whose ids do not fit a message to "
            f"a worker ({MAX_MESSAGE_BYTES >> 20} MiB): at most {room // _REQUEST_ID_BYTES} together"
        )
    return _BASE_BYTES + max(_TOKEN_BYTES * context, _REQUEST_ID_BYTES * num_requests)


NEVER_S = 60.0  # retry_after_s of a request for which no departure makes room

# --- gateway -> worker ----------------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Run one sequence.

    req_id: unique for the cluster's life; one HTTP request with n choices is n of them.
    attempt: 0 first, +1 at each resubmission after a lost worker.
    output_ids: tokens already delivered to the client; the worker goes on at output index len(output_ids).
    priority: lower runs first (0 default).
    ttft_deadline_s: seconds until its first token is due; 0 = none.
    """

    req_id: str
    attempt: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    ttft_deadline_s: float = 0.0
    tpot_s: float = 0.0  # the request's own TPOT target; 0 = the cluster's


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """The client has gone or the text is complete (stop string): free the request. Unknown ids are ignored."""

    req_ids: list[str]


class Resend(msgspec.Struct, tag="resend", frozen=True):
    """The gateway saw a gap: send the tokens of `attempt` again from output index `from_idx`."""

    req_id: str
    attempt: int
    from_idx: int


class Lease(msgspec.Struct, tag="lease", frozen=True):
    """Sent every second by each gateway: while it lasts its requests live; when it ends they are aborted.

    It comes with the requests, and once more over a connection of its own (`lease_identity`), from a thread that no
    request can keep busy and past any queue of submissions.
    """

    gateway: str
    ttl_s: float
    live_req_ids: list[str] | None = None  # sent now and then, so that lost aborts cannot leak requests


def lease_identity(gateway: str) -> bytes:
    """ZeroMQ identity of the connection over which only a gateway's leases come."""
    return b"lease-" + gateway.encode()


GatewayMessage = Union[Submit, Abort, Resend, Lease]

# --- worker -> gateway ----------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one output position: of the sampled token, and of the k most likely (id, logprob)."""

    logprob: float
    top: list[tuple[int, float]]


class TokenChunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request. `ids` start at output index `first_idx` (which counts resubmitted output too).

    finish: set on the last chunk.
    error: text for the client when finish is ERROR.
    retryable: the request ended for the worker's sake, not for its own: another attention worker can go on with it.
    cached_tokens: prompt tokens found in the prefix cache (on the first chunk of an attempt).
    preempted: how often the request was preempted so far.
    """

    req_id: str
    attempt: int
    first_idx: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    error: str | None = None
    retryable: bool = False
    cached_tokens: int = 0
    preempted: int = 0


class Tokens(msgspec.Struct, tag="tokens", frozen=True):
    """All chunks of one step for one gateway."""

    chunks: list[TokenChunk]


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Not admitted here.

    reason: "capacity" (predicted latency or KV), "draining", "not_ready", "invalid"; "unknown": a Resend named an
    attempt that is not here (its Submit was lost).
    retry_after_s: when a place is predicted.  For "invalid", detail is the text for the client.
    """

    req_id: str
    attempt: int
    reason: str
    detail: str
    retry_after_s: float = 1.0


PLACE_RANKS = (
    *range(16), *range(16, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 256, 16), *range(256, 513, 32)
)  # fmt: skip
"""Which of the next requests `WorkerStats.places_s` tells of (0 = the next one): far ones need not be told apart."""


class WorkerStats(msgspec.Struct, tag="stats", frozen=True):
    """Load of one attention worker: sent on every change of note, at most every 100 ms, at least every second.

    places_s: until typical requests would be admitted, one after another: those of PLACE_RANKS, as many as are worth
    telling; ascending; empty = all of them now.
    max_tokens: prompt and output together, of the longest sequence that can run here; 0 = not known.
    ready: it reaches its FFN workers.
    """

    rank: int
    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    draining: bool = False
    places_s: Annotated[list[float], Meta(max_length=len(PLACE_RANKS))] = []
    prefix_hits: int = 0  # prompt tokens, cumulative
    prefix_queries: int = 0
    num_preemptions: int = 0
    prefill_token_s: float = 0.0  # predicted, from a place to the first token, per prompt token
    max_tokens: int = 0
    ready: bool = True


WorkerMessage = Union[Tokens, Refused, WorkerStats]

gateway_message_decoder: Decoder[GatewayMessage] = Decoder(GatewayMessage)  # type: ignore[arg-type]
worker_message_decoder: Decoder[WorkerMessage] = Decoder(WorkerMessage)  # type: ignore[arg-type]

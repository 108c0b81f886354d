"""Blocking client of the coordinator: calls with a deadline, and one that stays open. Never a worker's main loop."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TypeVar

import grpc
import msgspec

from afd.errors import CoordinatorError
from afd.membership.tls import channel_credentials
from afd.messages.codec import Decoder, MessageError, encode
from afd.messages.membership import (
    ClusterView,
    ControlReply,
    ControlRequest,
    FollowRequest,
    RegisterReply,
    RegisterRequest,
    StatusReply,
    StatusRequest,
    SyncReply,
    SyncRequest,
    control_reply_decoder,
    register_reply_decoder,
    status_reply_decoder,
    sync_reply_decoder,
    view_decoder,
)

SERVICE = "afd.Coordinator"
MAX_REPLY_BYTES = 8 << 20
_T = TypeVar("_T")

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted coordinator is found at once
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # a host that vanishes closes no connection
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # two clients of one process do not share fate
]


class CoordinatorUnreachableError(CoordinatorError):
    """No answer in time: not started yet, restarting, or the address is wrong. A retry may help."""


class CoordinatorClient:
    """Calls `address` ("host:port") with the cluster's bearer token. `close()` ends the channel.

    ca_file: the coordinator speaks TLS with a certificate of this CA (PEM); "" = plain text.
    """

    def __init__(self, address: str, token: str, *, ca_file: str = "", timeout_s: float = 2.0):
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),)
        credentials = channel_credentials(ca_file)
        self._channel = (
            grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
            if credentials is not None
            else grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        )
        self._methods = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in ("Register", "Sync", "Status", "Control")
        }
        self._follow = self._channel.unary_stream(f"/{SERVICE}/Follow")

    def register(self, request: RegisterRequest, *, timeout_s: float | None = None) -> RegisterReply:
        """Join the cluster. The reply's `error` is a refusal; CoordinatorError as below."""
        return self._call("Register", request, register_reply_decoder, timeout_s)

    def sync(self, request: SyncRequest, *, timeout_s: float | None = None) -> SyncReply:
        """One heartbeat."""
        return self._call("Sync", request, sync_reply_decoder, timeout_s)

    def follow(self, incarnation: str) -> Iterator[ClusterView]:
        """The view, and each one after it, until the connection ends, which is no error: ask again.

        Ends at once for who is no member (yet, or any more). Blocks without a deadline: `close` ends it.
        """
        try:
            for body in self._follow(encode(FollowRequest(incarnation)), metadata=self._metadata):
                yield view_decoder.decode(body)
        except (grpc.RpcError, MessageError, ValueError):  # ValueError: the channel is closed
            return

    def status(self, *, timeout_s: float | None = None) -> StatusReply:
        """The view with what is known of each member."""
        return self._call("Status", StatusRequest(), status_reply_decoder, timeout_s)

    def control(self, request: ControlRequest, *, timeout_s: float | None = None) -> ControlReply:
        """Shutdown or drain."""
        return self._call("Control", request, control_reply_decoder, timeout_s)

    def close(self) -> None:
        """Cancel what is under way and close the channel; idempotent."""
        self._channel.close()

    def __enter__(self) -> CoordinatorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, request: msgspec.Struct, decoder: Decoder[_T], timeout_s: float | None) -> _T:
        """One unary call; CoordinatorUnreachableError (retry) or CoordinatorError (do not)."""
        deadline_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            reply = self._methods[method](encode(request), timeout=deadline_s, metadata=self._metadata)
            return decoder.decode(reply)
        except grpc.RpcError as error:
            raise self._translate(error) from error
        except MessageError as error:
            raise CoordinatorError(f"{self.address} does not speak this version of the protocol: {error}") from error
        except ValueError as error:  # grpc: the channel was closed by another thread
            raise CoordinatorUnreachableError(f"connection to the coordinator {self.address} is closed") from error

    def _translate(self, error: grpc.RpcError) -> CoordinatorError:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return CoordinatorError(
                f"the coordinator {self.address} refused this process's secret: "
                f"every process of a cluster needs the same --secret-file"
            )
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT):
            return CoordinatorError(f"the coordinator {self.address} does not understand this process: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return CoordinatorUnreachableError(f"no answer from the coordinator {self.address} in time")
        return CoordinatorUnreachableError(f"coordinator {self.address} cannot be reached ({details})")

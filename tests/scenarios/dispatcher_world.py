"""A gateway's `Dispatcher` with scripted workers and clients, as the world of a scenario."""

from __future__ import annotations

from dataclasses import dataclass, field

from afd.errors import UnavailableError
from afd.gateway.sequence import ClientSequence
from afd.messages.serving import Abort, GatewayMessage, Lease, Resend, Submit, TokenChunk, Tokens
from afd.types import FinishReason
from tests.fakes.dispatch_scene import Scene, member, stats

LIMITS = {"lease_s": 3.0, "request_timeout_s": 60.0, "recovery_timeout_s": 10.0, "silence_s": 5.0}
TICK_S = 0.1


@dataclass(slots=True)
class _Told:
    """What was said of a client so far."""

    num_tokens: int = 0
    ended: bool = False


@dataclass(slots=True)
class _Port:
    """Writes down what the gateway sends, leases apart: those go out all the time."""

    lines: list[str] = field(default_factory=list)

    def connect(self, key: str, endpoint: str) -> None: ...

    def disconnect(self, key: str) -> None: ...

    def send(self, key: str, message: GatewayMessage) -> None:
        if not isinstance(message, Lease):
            self.lines.append(f"{key} <- {_described(message)}")


class DispatcherWorld:
    """Workers are called by their name; requests r1, r2, ... in the order in which they come.

    `r1/0` is the attempt 0 of request r1. Tokens are counted from 0.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._port = _Port()
        self._scene = Scene("", port=self._port, **LIMITS)
        self._silent: set[str] = set()
        self._away: set[str] = set()
        self._requests: dict[str, ClientSequence] = {}
        self._told: dict[str, _Told] = {}

    # -- commands: the cluster ----------------------------------------------------------------------------

    def join(self, name: str, state: str = "ready") -> None:
        """A new view has this worker (ready or loading), and it reports."""
        rank = len(self._scene.members)
        self._show(name, rank, ready=state == "ready")
        self._report(name)

    def ready(self, name: str) -> None:
        """A new view: the worker serves."""
        self._show(name, self._scene.members[name].rank)

    def not_ready(self, name: str) -> None:
        """A new view: the worker cannot serve."""
        self._show(name, self._scene.members[name].rank, ready=False)

    def drain(self, name: str) -> None:
        """A new view: the worker takes nothing new."""
        self._show(name, self._scene.members[name].rank, draining=True)

    def leave(self, name: str) -> None:
        """A new view without this worker."""
        del self._scene.members[name]
        self._scene.publish(self._now)

    def silent(self, name: str) -> None:
        """The worker says nothing from now on."""
        self._silent.add(name)

    def wait(self, seconds: str) -> None:
        """Time passes; every worker that is not silent reports."""
        end = self._now + float(seconds)
        while self._now < end - 1e-9:
            self._now = min(end, self._now + TICK_S)
            for name in self._scene.members:
                if name not in self._silent:
                    self._report(name)
            self._scene.dispatcher.tick(self._now)

    def away(self, name: str) -> None:
        """The worker itself says that it reaches no FFN worker; no coordinator is there to publish it."""
        self._away.add(name)
        self._report(name)

    def back(self, name: str) -> None:
        """The worker itself says that it serves."""
        self._away.remove(name)
        self._report(name)

    def _report(self, name: str) -> None:
        known = self._scene.members[name]
        self._scene.say(name, stats(known.rank, ready=known.ready and name not in self._away), self._now)

    # -- commands: requests -------------------------------------------------------------------------------

    def submit(self, output: str = "10") -> None:
        """A client asks for so many tokens."""
        try:
            sequence = self._scene.submit(self._now, max_tokens=int(output))
        except UnavailableError as error:
            self._port.lines.append(f"a client gets {_named(error)}")
            return
        self._requests[sequence.req_id] = sequence
        self._told[sequence.req_id] = _Told()

    def abort(self, request: str) -> None:
        """The client has gone."""
        self._scene.dispatcher.abort([self._requests[request]], self._now)

    def tokens(self, name: str, request: str, which: str, finish: str = "", attempt: str = "") -> None:
        """The worker sends tokens FIRST..LAST of a request, of its newest attempt unless another is given."""
        first, _, last = which.partition("..")
        ids = list(range(int(first), int(last or first) + 1))
        tried = int(attempt or self._requests[request].attempt)
        chunk = TokenChunk(request, tried, ids[0], ids, finish=FinishReason(finish) if finish else None)
        self._scene.say(name, Tokens([chunk]), self._now)

    def error(self, name: str, request: str, text: str, retryable: str = "no") -> None:
        """The worker ends the request with an error."""
        fields = {"finish": FinishReason.ERROR, "error": text, "retryable": retryable == "yes"}
        self._scene.tokens(name, self._requests[request], [], self._now, **fields)

    def refuse(self, name: str, request: str, reason: str = "capacity") -> None:
        """The worker does not take the request."""
        self._scene.refuse(name, self._requests[request], self._now, reason=reason)

    # -- what comes of it ---------------------------------------------------------------------------------

    def news(self) -> list[str]:
        lines, self._port.lines = self._port.lines, []
        for req_id, sequence in self._requests.items():
            sink, told = sequence.sink, self._told[req_id]
            assert sink.ids == list(range(len(sink.ids))), "a token is missing, or came twice"
            if len(sink.ids) > told.num_tokens:
                told.num_tokens = len(sink.ids)
                lines.append(f"client of {req_id} has {told.num_tokens} tokens")
            if not told.ended and (sink.finish or sink.error):
                told.ended = True
                end = f"is done: {sink.finish.value}" if sink.finish else f"gets {_named(sink.error)}"
                lines.append(f"client of {req_id} {end}")
        return lines

    def _show(self, name: str, rank: int, *, ready: bool = True, draining: bool = False) -> None:
        self._scene.members[name] = member(name, rank, ready=ready, draining=draining)
        self._scene.publish(self._now)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _described(message: GatewayMessage) -> str:
    if isinstance(message, Submit):
        so_far = f", {len(message.output_ids)} tokens are there" if message.output_ids else ""
        return f"submit {message.req_id}/{message.attempt}{so_far}"
    if isinstance(message, Abort):
        return f"abort {' '.join(message.req_ids)}"
    assert isinstance(message, Resend)
    return f"resend {message.req_id}/{message.attempt} from {message.from_idx}"

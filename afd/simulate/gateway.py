"""The gateway and its clients: the service's dispatcher, between arrivals and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from afd.errors import AfdError, UnavailableError
from afd.gateway.dispatcher import Dispatcher, DispatchLimits
from afd.gateway.sequence import ClientSequence, Delta
from afd.messages.membership import ClusterView
from afd.messages.serving import GatewayMessage, WorkerMessage
from afd.simulate.arrivals import Arrivals, ClosedLoop, Request
from afd.simulate.events import EventQueue
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.worker import GATEWAY_NAME, STOP_TOKEN, WORD_TOKEN
from afd.types import SamplingParams

TICK_S = 0.1


class _Client:
    """The sink of one request."""

    __slots__ = ("_done", "_first_s", "_gateway", "_last_s", "_num_tokens", "request", "sent_s")

    def __init__(self, gateway: Gateway, request: Request, sent_s: float):
        self._gateway = gateway
        self.request = request
        self.sent_s = sent_s
        self._num_tokens = 0
        self._first_s = 0.0
        self._last_s = 0.0
        self._done = False

    def push(self, sequence: ClientSequence, delta: Delta, now: float) -> None:
        if delta.ids:
            if not self._num_tokens:
                self._first_s = now
            self._last_s = now
            self._num_tokens += len(delta.ids)
        if delta.finish is not None:
            self._end()
            self._gateway.answered(self, self._first_s - self.sent_s, self._last_s - self._first_s, self._num_tokens)

    def fail(self, error: AfdError) -> None:
        self._end()
        self._gateway.failed(self, error)

    def _end(self) -> None:
        assert not self._done, f"request {self.request.idx} was answered twice"
        self._done = True


class Gateway:
    """The gateway's dispatcher and its clients. In a closed loop, one request follows each that ended.

    send: hands a message to a worker.
    targets: output tokens of each live request, for the worker that samples its stop token.
    """

    def __init__(
        self,
        settings: Settings,
        arrivals: Arrivals,
        events: EventQueue,
        results: Results,
        send: Callable[[str, GatewayMessage], None],
    ):
        self.targets: dict[str, int] = {}
        self.exhausted = False
        self._send = send
        self._settings = settings
        self._events = events
        self._results = results
        self._closed = arrivals.concurrency if isinstance(arrivals, ClosedLoop) else 0
        self._arrivals: Iterator[Request] = iter(arrivals)
        self._origin_s = 0.0
        limits = DispatchLimits(
            max_queue=settings.max_queue,
            ttft_s=settings.ttft_s,
            enforce=settings.policy == "enforce",
            request_timeout_s=settings.request_timeout_s,
        )
        self.dispatcher = Dispatcher(GATEWAY_NAME, limits, self)

    @property
    def done(self) -> bool:
        """Every request has arrived and ended."""
        return self.exhausted and not self.targets

    def start(self) -> None:
        """The first arrivals, counted from now, and the clock."""
        self._origin_s = self._events.now
        for _ in range(self._closed or 1):
            self._next()
        self._events.after(TICK_S, self._tick)

    def adopt(self, view: ClusterView) -> None:
        """A new view of the cluster."""
        self.dispatcher.on_view(view, self._events.now)

    def hear(self, key: str, message: WorkerMessage) -> None:
        """A worker's message is here."""
        self.dispatcher.on_message(key, message, self._events.now)
        self._results.queued(len(self.dispatcher.queue))

    # -- WorkerPort ---------------------------------------------------------------------------------------

    def connect(self, key: str, endpoint: str) -> None:
        pass  # messages find their worker by its key

    def disconnect(self, key: str) -> None:
        pass

    def send(self, key: str, message: GatewayMessage) -> None:
        self._send(key, message)

    # -- clients ------------------------------------------------------------------------------------------

    def answered(self, client: _Client, ttft_s: float, decode_s: float, num_tokens: int) -> None:
        """Complete."""
        assert num_tokens == client.request.num_output, f"request {client.request.idx}: {num_tokens} tokens"
        self._results.answered(self._events.now, ttft_s, decode_s, client.request.num_prompt, num_tokens)
        self._ended(client)

    def failed(self, client: _Client, error: AfdError) -> None:
        """Turned away (503), or lost on the way."""
        if isinstance(error, UnavailableError):
            self._results.refused(self._events.now, error.code)
        else:
            self._results.lost(self._events.now, str(error))
        self._ended(client)

    def _ended(self, client: _Client) -> None:
        del self.targets[_id(client.request)]
        if self._closed:
            self._events.after(0.0, self._next)

    def _next(self) -> None:
        """Plan the next arrival, or make it where clients wait for answers."""
        request = next(self._arrivals, None)
        if request is None:
            self.exhausted = True
        elif self._closed:
            self._arrive(request)
        else:
            self._events.at(self._origin_s + request.at_s, self._arrive_and_next, request)

    def _arrive_and_next(self, request: Request) -> None:
        self._arrive(request)
        self._next()

    def _arrive(self, request: Request) -> None:
        now, client = self._events.now, _Client(self, request, self._events.now)
        self._results.arrived()
        self.targets[_id(request)] = request.num_output
        sequence = ClientSequence(_id(request), 0, [WORD_TOKEN] * request.num_prompt, self._sampling(request), client)
        try:
            self.dispatcher.submit([sequence], now)
        except UnavailableError as error:
            client.fail(error)
        self._results.queued(len(self.dispatcher.queue))

    def _sampling(self, request: Request) -> SamplingParams:
        if not self._settings.stops_early:
            return SamplingParams(max_tokens=request.num_output, seed=0)
        return SamplingParams(max_tokens=self._settings.max_tokens, seed=0, stop_token_ids=(STOP_TOKEN,))

    def _tick(self) -> None:
        self.dispatcher.tick(self._events.now)
        self._events.after(TICK_S, self._tick)


def _id(request: Request) -> str:
    return f"r{request.idx}"

"""The gateway and its clients: the service's dispatcher, between arrivals and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from afd.errors import AfdError, UnavailableError
from afd.gateway.dispatcher import Dispatcher, DispatchLimits
from afd.gateway.sequence import ClientSequence, Delta
from afd.messages.membership import ClusterView
from afd.messages.serving import GatewayMessage, WorkerMessage
from afd.simulate.arrivals import Arrivals, Request
from afd.simulate.events import EventQueue
from afd.simulate.outcomes import Ending, Outcome
from afd.simulate.prompts import Prompts
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.worker import GATEWAY_NAME, STOP_TOKEN
from afd.types import SamplingParams

TICK_S = 0.1


class _Client:
    """The sink of one request. at_s: when it came, as arrivals count. ended: told what became of it."""

    __slots__ = (
        "_at_s",
        "_done",
        "_ended",
        "_events",
        "_first_s",
        "_last_s",
        "_num_tokens",
        "_request",
        "_sent_s",
        "sequence",
    )

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        sampling: SamplingParams,
        at_s: float,
        events: EventQueue,
        ended: Callable[[Outcome], None],
    ):
        self.sequence = ClientSequence(_id(request), 0, prompt_ids, sampling, self)
        self._ended = ended
        self._request = request
        self._at_s = at_s
        self._events = events
        self._sent_s = events.now
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
            assert self._num_tokens == self._request.num_output, f"{sequence.req_id}: {self._num_tokens} tokens"
            self._end("answered", "")

    def fail(self, error: AfdError) -> None:
        """Turned away (503), or lost on the way."""
        if isinstance(error, UnavailableError):
            self._end("refused", error.code)
        else:
            self._end("lost", str(error))

    def _end(self, ending: Ending, reason: str) -> None:
        assert not self._done, f"{self.sequence.req_id} was answered twice"
        self._done = True
        sequence, num_tokens = self.sequence, self._num_tokens
        self._ended(
            Outcome(
                request=self._request.idx,
                at_s=self._at_s,
                input_len=self._request.num_prompt,
                output_len=num_tokens,
                ending=ending,
                reason=reason,
                ttft_s=self._first_s - self._sent_s if num_tokens else None,
                tpot_s=(self._last_s - self._first_s) / (num_tokens - 1) if num_tokens > 1 else None,
                e2el_s=self._events.now - self._sent_s,
                cached_tokens=sequence.cached_tokens,
                worker=sequence.worker_key,
                attempts=sequence.attempt + 1,
                preempted=sequence.num_preempted,
            )
        )


class Gateway:
    """The gateway's dispatcher and its clients. In a closed loop, one request follows each that ended.

    send: hands a message to a worker.
    watch: told what became of each request.
    targets: output tokens of each live request, for the worker that samples its stop token.
    """

    def __init__(
        self,
        settings: Settings,
        arrivals: Arrivals,
        events: EventQueue,
        results: Results,
        send: Callable[[str, GatewayMessage], None],
        watch: Callable[[Outcome], None] | None = None,
    ):
        self.targets: dict[str, int] = {}
        self.exhausted = False
        self._send = send
        self._settings = settings
        self._events = events
        self._results = results
        self._watch = watch
        self._closed = arrivals.concurrency
        self._prompts = Prompts(settings.times.vocab, settings.hash_block_tokens)
        self._arrivals: Iterator[Request] = iter(arrivals)
        self._origin_s = 0.0
        limits = DispatchLimits(
            max_queue=settings.max_queue,
            ttft_s=settings.ttft_s,
            enforce=settings.policy == "enforce",
            request_timeout_s=settings.request_timeout_s,
            recovery_timeout_s=settings.recovery_timeout_s,
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

    def _ended(self, outcome: Outcome) -> None:
        del self.targets[f"r{outcome.request}"]
        self._results.ended(outcome, self._events.now)
        if self._watch is not None:
            self._watch(outcome)
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
        ids, at_s = self._prompts.ids(request), self._events.now - self._origin_s
        client = _Client(request, ids, self._sampling(request), at_s, self._events, self._ended)
        self._results.arrived()
        self.targets[_id(request)] = request.num_output
        try:
            self.dispatcher.submit([client.sequence], self._events.now)
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

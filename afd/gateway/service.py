"""The gateway as one object: model, workers, queue, metrics and its clock. HTTP handlers call it; `serve` owns it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from dataclasses import replace

from prometheus_client import CollectorRegistry

from afd.config import ClusterConfig
from afd.errors import UnavailableError
from afd.gateway.body import BodyRoom
from afd.gateway.dispatcher import MIN_SILENCE_S, Dispatcher, DispatchLimits
from afd.gateway.generation import Generation, GenerationJob
from afd.gateway.intake.intake import Intake
from afd.gateway.lease_keeper import LeaseKeeper
from afd.gateway.metrics import DispatchCollector, GatewayMetrics
from afd.gateway.sequence import ClientSequence
from afd.gateway.served_model import ServedModel
from afd.gateway.sla import SlaWindow
from afd.gateway.stop import StopMatcher
from afd.gateway.worker_client import WorkerClient
from afd.membership.port import Membership
from afd.messages.membership import ClusterView
from afd.messages.serving import WorkerMessage, WorkerStats
from afd.telemetry.exposition import process_registry
from afd.types import SamplingParams

log = logging.getLogger(__name__)

TICK_S = 0.1


class GatewayService:
    """Event-loop thread only, except that the membership calls back from its own thread.

    `start` once, then `generate` per request, `drain` before `close`.
    """

    def __init__(self, config: ClusterConfig, model: ServedModel, membership: Membership, secret: bytes):
        self.config = config
        self._own_model = model
        self.model = model  # with the context that the workers have room for
        self.gateway_id = uuid.uuid4().hex
        self.draining = False
        self.bodies = BodyRoom(max(config.gateway.max_waiting_bytes, config.gateway.max_body_bytes))
        self.intake = Intake(model, config.gateway)
        self._membership = membership
        self._client = WorkerClient(secret, self.gateway_id.encode(), self._on_message)
        self._leases = LeaseKeeper(secret, self.gateway_id, config.gateway.lease_s)
        self.dispatcher = Dispatcher(self.gateway_id, _limits(config, model), self._client)
        self.registry: CollectorRegistry = process_registry("gateway")
        self._sla = SlaWindow(config.sla.tpot_ms / 1e3, config.sla.ttft_ms / 1e3)
        self.metrics = GatewayMetrics(self.registry, model.name, self._sla)
        links, block_size = self._client.counters, config.attention.block_size
        self.registry.register(DispatchCollector(self.dispatcher, links, model.name, self._sla, block_size))
        self._generations: set[Generation] = set()
        self._num_requests = 0
        self._ticker: asyncio.Task[None] | None = None
        self._published_ready = False

    def start(self) -> None:
        """Begin to follow the membership and to tick; call inside the running loop."""
        loop = asyncio.get_running_loop()

        def on_view(view: ClusterView) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has this gateway
                loop.call_soon_threadsafe(self._on_view, view)

        self._membership.on_view(on_view)
        self._ticker = loop.create_task(self._tick_forever(), name="gateway clock")

    async def close(self) -> None:
        """Abort what runs, close the links."""
        for generation in list(self._generations):
            generation.fail(UnavailableError("the gateway is shutting down", code="shutdown"))
            self.abort(generation)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        self._leases.close()
        await self.intake.close()
        await self._client.close()

    # --- requests ---------------------------------------------------------------------------------------

    def check_room(self, priority: int, ttft_s: float | None) -> None:
        """UnavailableError where the queue would refuse a request whatever it asks for."""
        self.dispatcher.check_room(time.monotonic(), priority=priority, ttft_s=ttft_s)

    def _check_ready(self) -> None:
        reason = self.unready_reason()
        if reason is not None:
            raise UnavailableError(reason, code="shutdown" if self.draining else "not_ready")

    def generate(self, job: GenerationJob) -> Generation:
        """Start a request. UnavailableError when the cluster cannot take it; the caller must `close` the result."""
        self._check_ready()
        self._num_requests += 1
        generation = Generation(self.metrics, self.abort)
        for prompt_ids, sampling in job.prompts:
            for choice in range(job.num_choices):
                generation.add(self._sequence(generation, job, prompt_ids, replace(sampling, choice=choice)))
        now = time.monotonic()
        generation.expires_at = now + self.config.gateway.request_timeout_s
        self.dispatcher.submit(generation.sequences, now, ttft_s=job.ttft_s)
        for sequence in generation.sequences:
            self.metrics.submitted(sequence)
        self._generations.add(generation)
        return generation

    def abort(self, generation: Generation) -> None:
        """Free whatever of a request still runs. Idempotent."""
        self._generations.discard(generation)
        self.dispatcher.abort(generation.sequences, time.monotonic())

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; wait for the running ones, then end the rest with an error event."""
        self.draining = True
        self._publish_ready()
        deadline = time.monotonic() + timeout_s
        while self._generations and time.monotonic() < deadline:
            await asyncio.sleep(TICK_S / 2)
        if self._generations:
            log.warning("%d requests did not finish within %.0f s: ended", len(self._generations), timeout_s)
        for generation in list(self._generations):
            generation.fail(UnavailableError("the gateway is shutting down", code="shutdown"))
            self.abort(generation)

    @property
    def num_requests_running(self) -> int:
        return len(self._generations)

    # --- state ------------------------------------------------------------------------------------------

    def view(self) -> ClusterView | None:
        return self._membership.view()

    def load(self, now: float) -> dict[str, float]:
        """Flat figures for `afd status` and the autoscaler; the SLA ones over requests of the last minute."""
        report = self._sla.report(now)
        return {
            "running": float(self.dispatcher.num_running),
            "queued": float(len(self.dispatcher.queue)),
            "arrived": float(self.dispatcher.num_arrived),
            "finished": float(report.num_requests),
            "tpot_p99_ms": report.tpot_p99_s * 1e3,
            "ttft_p99_ms": report.ttft_p99_s * 1e3,
            "tpot_met": report.tpot_attainment,
            "ttft_met": report.ttft_attainment,
        }

    def unready_reason(self) -> str | None:
        """Why new requests are refused, in one line; None when they are taken.

        Workers that serve are enough: a coordinator may be away. While nobody serves for a moment, requests wait.
        """
        if self.draining:
            return "the gateway is shutting down"
        view = self._membership.view()
        if view is None:
            return "the coordinator has not answered yet"
        if view.shutdown:
            return "the cluster is shutting down"
        if self.dispatcher.serves or self.dispatcher.may_recover(time.monotonic()):
            return None
        if not self._membership.coordinator_alive:
            return "the coordinator does not answer, and no attention worker serves"
        if not view.formed:
            found = f"{len(view.of_role('attention'))} of {view.num_attention} attention workers"
            found += f" and {len(view.of_role('ffn'))} of {view.num_ffn} FFN workers"
            return f"the cluster is not complete: {found} are here"
        return "no attention worker is ready"

    # --- internals --------------------------------------------------------------------------------------

    def _sequence(
        self, generation: Generation, job: GenerationJob, prompt_ids: list[int], sampling: SamplingParams
    ) -> ClientSequence:
        detokenizer = None
        if self.model.tokenizer is not None:
            skip_special = job.skip_special_tokens
            detokenizer = self.model.tokenizer.detokenizer(prompt_ids, skip_special_tokens=skip_special)
        choice_idx = len(generation.sequences)
        return ClientSequence(
            f"{self.gateway_id}-{self._num_requests}-{choice_idx}",
            choice_idx,
            prompt_ids,
            sampling,
            generation,
            detokenizer=detokenizer,
            stop=StopMatcher(job.stops, include=job.include_stop) if job.stops else None,
            own_stop_ids=job.own_stop_ids,
            priority=job.priority,
            tpot_s=job.tpot_s,
        )

    def _on_view(self, view: ClusterView) -> None:
        self.dispatcher.on_view(view, time.monotonic())
        self._leases.follow({worker.key: worker.endpoint for worker in self.dispatcher.workers.values()})
        self._follow_context()
        self._publish_ready()

    def _on_message(self, key: str, message: WorkerMessage) -> None:
        self.dispatcher.on_message(key, message, time.monotonic())
        if isinstance(message, WorkerStats):
            self._follow_context()
            self._publish_ready()

    def _follow_context(self) -> None:
        """A request may run at any worker, now or after a migration: the smallest KV cache bounds its context."""
        reported = [worker.stats.max_tokens for worker in self.dispatcher.workers.values() if worker.stats is not None]
        max_context = min([self._own_model.max_context, *(tokens for tokens in reported if tokens > 0)])
        if max_context != self.model.max_context:
            self.model = replace(self._own_model, max_context=max_context)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._tick(time.monotonic())
            except Exception:  # a bug of ours must not stop leases and deadlines of all requests
                log.exception("the gateway's clock failed")

    def _tick(self, now: float) -> None:
        self._leases.beat()
        self.dispatcher.tick(now)
        keepalive_s = self.config.gateway.sse_keepalive_s
        for generation in list(self._generations):
            if now >= generation.expires_at:
                limit = f"{self.config.gateway.request_timeout_s:.0f} s (gateway.request_timeout_s)"
                generation.fail(UnavailableError(f"the request took longer than {limit}", code="timeout"))
                self.abort(generation)
            elif now - generation.read_at >= keepalive_s:
                generation.nudge()
        self._publish_ready()

    def _publish_ready(self) -> None:
        ready = self.unready_reason() is None
        if ready != self._published_ready:
            self._published_ready = ready
            self._membership.set_ready(ready)


def _limits(config: ClusterConfig, model: ServedModel) -> DispatchLimits:
    return DispatchLimits(
        lease_s=config.gateway.lease_s,
        max_queue=config.gateway.max_queue,
        ttft_s=config.sla.ttft_ms / 1e3,
        enforce=config.sla.policy == "enforce",
        request_timeout_s=config.gateway.request_timeout_s,
        recovery_timeout_s=config.cluster.recovery_timeout_s,
        silence_s=max(config.coordinator.stall_timeout_s, MIN_SILENCE_S),
        vocab_size=model.vocab_size,
    )

"""The gateway's metrics: own names (afd_*) and vLLM's, which dashboards and endpoint pickers already query.

To the outside the cluster is one engine ("0"): endpoint pickers take the first series of a name, whatever its labels,
so each of vLLM's names has one, a total over the workers. Each worker exports its own share (afd_*).
Histograms are observed as tokens pass; everything the dispatcher counts anyway is read from it at scrape time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.gateway.dispatcher import Dispatcher
from afd.gateway.sequence import ClientSequence, Delta
from afd.gateway.sla import SlaWindow
from afd.gateway.worker_client import LinkCounters
from afd.types import FinishReason

# 50 ms, the default TPOT target, is a bucket edge.
_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 600.0)
_LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class GatewayMetrics:
    """What is observed per request and per token. One instance per gateway; called from the event loop only."""

    def __init__(self, registry: CollectorRegistry, model_name: str, sla: SlaWindow):
        self.registry = registry
        self.sla = sla
        labels = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(name, text, list(labels), registry=registry, buckets=tuple(buckets))
            return family.labels(**labels)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Time to first token", _FIRST_BUCKETS)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Gap between tokens, pooled", _TOKEN_BUCKETS)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Per request: (last - first token) / (n - 1)", _TOKEN_BUCKETS
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Request latency", _REQUEST_BUCKETS)
        self._queue_time = histogram(
            "vllm:request_queue_time_seconds", "From arrival to placement at a worker", _FIRST_BUCKETS
        )
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens per request", _LENGTH_BUCKETS)
        self._output_length = histogram("vllm:request_generation_tokens", "Output tokens per request", _LENGTH_BUCKETS)
        self._max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens asked for", _LENGTH_BUCKETS)
        self._prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of sequences that have a first token", list(labels), registry=registry
        ).labels(**labels)
        self._output_tokens = Counter(
            "vllm:generation_tokens", "Output tokens received", list(labels), registry=registry
        ).labels(**labels)
        success = Counter(
            "vllm:request_success", "Sequences that ended", [*labels, "finished_reason"], registry=registry
        )
        self._success = {reason: success.labels(**labels, finished_reason=str(reason)) for reason in FinishReason}
        self._http = Counter(
            "afd_gateway_http_requests", "HTTP requests by path and status", ["path", "status"], registry=registry
        )
        self._failures = Counter(
            "afd_gateway_request_failures", "Requests that failed after submission", ["code"], registry=registry
        )
        self._disconnects = Counter(
            "afd_gateway_disconnects", "Clients gone before their answer was complete", registry=registry
        )

    def http_request(self, path: str, status: int) -> None:
        """A response began. path: of a known route, or "other"."""
        self._http.labels(path, str(status)).inc()

    def failure(self, code: str) -> None:
        self._failures.labels(code).inc()

    def disconnect(self) -> None:
        self._disconnects.inc()

    def submitted(self, sequence: ClientSequence) -> None:
        self._prompt_length.observe(len(sequence.prompt_ids))
        self._max_tokens.observe(sequence.sampling.max_tokens)

    def tokens(self, sequence: ClientSequence, delta: Delta, now: float) -> None:
        """Call before the sequence's token times are brought up to date."""
        self._output_tokens.inc(len(delta.ids))
        if sequence.first_token_at:
            self._itl.observe(now - sequence.last_token_at)
        else:
            self._prompt_tokens.inc(len(sequence.prompt_ids))
            self._ttft.observe(now - sequence.created_at)
            self._queue_time.observe(sequence.placed_at - sequence.created_at)

    def finished(self, sequence: ClientSequence, reason: FinishReason, now: float) -> None:
        num_tokens = len(sequence.output_ids)
        self._success[reason].inc()
        self._output_length.observe(num_tokens)
        self._e2e.observe(now - sequence.created_at)
        tpot_s = None
        if num_tokens > 1:
            tpot_s = (sequence.last_token_at - sequence.first_token_at) / (num_tokens - 1)
            self._tpot.observe(tpot_s)
        self.sla.add(now, sequence.first_token_at - sequence.created_at, tpot_s)

    def unfinished(self, num_sequences: int, reason: FinishReason) -> None:
        """Sequences of a request ended before their time: ABORT (the client has gone) or ERROR."""
        self._success[reason].inc(num_sequences)


class _Total:
    """A sum of workers' counters that does not fall when a worker leaves, and does not count one twice."""

    def __init__(self, name: str, text: str):
        self._name, self._text = name, text
        self._value = 0
        self._seen: dict[str, int] = {}

    def add(self, incarnation: str, value: int) -> None:
        """value: the worker's own count so far."""
        self._value += max(0, value - self._seen.get(incarnation, 0))
        self._seen[incarnation] = value

    def family(self, labels: dict[str, str]) -> Metric:
        family = CounterMetricFamily(self._name, self._text, labels=list(labels))
        family.add_metric(list(labels.values()), self._value)
        return family


class DispatchCollector(Collector):
    """Everything that is known without observing: workers' load, queue, counters, SLA. Rendered at scrape time."""

    def __init__(self, dispatcher: Dispatcher, links: LinkCounters, model_name: str, sla: SlaWindow, block_size: int):
        """links: to the workers.
        block_size: tokens of a KV block.
        """
        self._dispatcher = dispatcher
        self._links = links
        self._labels = {"model_name": model_name, "engine": "0"}
        self._sla = sla
        self._block_size = block_size
        self._queries = _Total("vllm:prefix_cache_queries", "Prompt tokens looked up")
        self._hits = _Total("vllm:prefix_cache_hits", "Prompt tokens found")
        self._preemptions = _Total("vllm:num_preemptions", "Preemptions")

    def describe(self) -> Iterable[Metric]:
        """Nothing to check at registration: names are fixed here."""
        return ()

    def collect(self) -> Iterable[Metric]:
        yield from self._gateway_metrics()
        yield from self._worker_metrics()
        yield from self._sla_metrics(time.monotonic())

    def _gateway_metrics(self) -> Iterable[Metric]:
        dispatcher, counters = self._dispatcher, self._dispatcher.counters
        yield GaugeMetricFamily("afd_gateway_queued_sequences", "Waiting for a worker", len(dispatcher.queue))
        yield GaugeMetricFamily("afd_gateway_running_sequences", "Placed at a worker", dispatcher.num_running)
        for name, text, value in (
            ("afd_gateway_placements", "Sequences sent to a worker", counters.placed),
            ("afd_gateway_worker_refusals", "Sequences refused by a worker", counters.refused),
            ("afd_gateway_migrations", "Sequences resubmitted to another worker", counters.migrated),
            ("afd_gateway_workers_lost", "Attention workers lost", counters.workers_lost),
            ("afd_gateway_token_gaps", "Gaps seen in token messages", counters.gaps),
            ("afd_gateway_stale_chunks", "Token messages of old attempts", counters.stale_chunks),
            ("afd_gateway_messages_unsent", "Messages to workers that were dropped", self._links.unsent),
            ("afd_gateway_messages_unreadable", "Messages of workers that were dropped", self._links.unreadable),
        ):
            yield CounterMetricFamily(name, text, value)
        rejections = CounterMetricFamily("afd_gateway_rejections", "503 before placement", labels=["reason"])
        rejections.add_metric(["queue_full"], counters.rejected_queue_full)
        rejections.add_metric(["ttft"], counters.rejected_ttft)
        yield rejections

    def _worker_metrics(self) -> Iterable[Metric]:
        workers = [worker for worker in self._dispatcher.workers.values() if not worker.lost]
        up = GaugeMetricFamily("afd_gateway_worker_up", "1 = the worker serves", labels=["rank"])
        for worker in self._dispatcher.workers.values():
            up.add_metric([str(worker.rank)], float(worker.serving))
        yield up
        reports = {worker.key: worker.stats for worker in workers if worker.stats is not None}
        for key, stats in reports.items():
            self._queries.add(key, stats.prefix_queries)
            self._hits.add(key, stats.prefix_hits)
            self._preemptions.add(key, stats.num_preemptions)
        yield from (total.family(self._labels) for total in (self._queries, self._hits, self._preemptions))
        num_waiting = sum(stats.num_waiting for stats in reports.values()) + len(self._dispatcher.queue)
        num_blocks = sum(stats.kv_blocks_total for stats in reports.values())
        num_free = sum(stats.kv_blocks_free for stats in reports.values())
        running = sum(stats.num_running for stats in reports.values())
        yield self._gauge("vllm:num_requests_running", "Sequences running, in the cluster", running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting at workers and in this gateway", num_waiting)
        usage = 1.0 - num_free / num_blocks if num_blocks else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 0..1, of all workers together", usage)
        awake = float(any(worker.serving for worker in workers))
        yield self._gauge("vllm:engine_sleep_state", "1 = a worker serves", awake, sleep_state="awake")
        if num_blocks:
            sizes = {"block_size": str(self._block_size), "num_gpu_blocks": str(num_blocks)}
            yield self._gauge("vllm:cache_config_info", "KV cache of all workers together", 1, **sizes)

    def _gauge(self, name: str, text: str, value: float, **labels: str) -> Metric:
        labels = self._labels | labels
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _sla_metrics(self, now: float) -> Iterable[Metric]:
        report = self._sla.report(now)
        for name, text, value in (
            ("afd_sla_window_requests", "Sequences finished in the last 60 s", report.num_requests),
            ("afd_sla_tpot_p50_seconds", "Median TPOT of the last 60 s", report.tpot_p50_s),
            ("afd_sla_tpot_p99_seconds", "99th percentile of TPOT of the last 60 s", report.tpot_p99_s),
            ("afd_sla_ttft_p99_seconds", "99th percentile of TTFT of the last 60 s", report.ttft_p99_s),
            ("afd_sla_tpot_attainment", "Share within the TPOT target, last 60 s", report.tpot_attainment),
            ("afd_sla_ttft_attainment", "Share within the TTFT target, last 60 s", report.ttft_attainment),
        ):
            yield GaugeMetricFamily(name, text, value)

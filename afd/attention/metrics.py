"""What an attention worker exports. Read from the engine's totals at scrape time: the hot loop knows no Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.attention.engine import Engine
from afd.attention.health import RecentAttention
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.worker.data_plane import mesh_metrics
from stepmesh.mesh import Mesh


class AttentionMetrics(Collector):
    """Collects at scrape, in the metrics thread; reads plain numbers only."""

    def __init__(
        self,
        registry: CollectorRegistry,
        engine: Engine,
        mesh: Mesh | None,
        admission: Admission,
        latency: LatencyModel,
        recent: RecentAttention,
    ):
        self._engine = engine
        self._mesh = mesh
        self._admission = admission
        self._latency = latency
        self._recent = recent
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        totals, scheduler = self._engine.stages.totals, self._engine.scheduler
        stage = CounterMetricFamily("afd_stage_seconds", "Seconds spent per stage", labels=["role", "stage"])
        for name, value in (
            ("attention", totals.attention_s),
            ("head", totals.head_s),
            ("exchange", totals.exchange_s),
            ("ffn", totals.ffn_s),
            ("wait", totals.wait_s),
            ("look_ahead", totals.ahead_s),
            ("other", totals.other_s),
        ):
            stage.add_metric(["attention", name], value)
        yield stage
        gauges = {
            "afd_requests_running": ("Sequences that hold KV blocks", scheduler.num_running),
            "afd_requests_waiting": ("Sequences waiting for a place", scheduler.num_waiting),
            "afd_kv_blocks_total": ("KV blocks", scheduler.pool.num_blocks),
            "afd_kv_blocks_free": ("Free KV blocks, cached ones included", scheduler.pool.num_free),
            "afd_pipeline_streams": ("Pipeline streams in use", scheduler.num_streams),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "afd_steps": ("Micro-batches committed", totals.num_steps),
            "afd_step_tokens": ("Tokens computed", totals.num_tokens),
            "afd_exchanges": ("Layer round trips", totals.num_exchanges),
            "afd_exchange_gang_members": (
                "Gang size summed over exchanges; / afd_exchanges = mean gang size",
                totals.num_gang_members,
            ),
            "afd_prefix_cache_queries": ("Prompt tokens looked up", scheduler.prefix_queries),
            "afd_prefix_cache_hits": ("Prompt tokens found", scheduler.prefix_hits),
            "afd_preemptions": ("Sequences preempted", scheduler.num_preemptions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        yield from self._pipeline_metrics()
        yield from self._sla_metrics()
        if self._mesh is not None:
            yield from mesh_metrics(self._mesh)

    def _pipeline_metrics(self) -> Iterable[Metric]:
        recent = self._recent.look()
        bubble = GaugeMetricFamily(
            "afd_bubble_ratio", "Share of the last 10 s spent waiting with work in flight", labels=["role"]
        )
        bubble.add_metric(["attention"], recent.bubble)
        yield bubble
        yield CounterMetricFamily(
            "afd_exposed_transfer_seconds",
            "Waited with work in flight while no FFN worker computed this worker's rows",
            value=self._engine.stages.totals.exposed_s,
        )
        yield GaugeMetricFamily(
            "afd_exposed_transfer_ratio", "Share of a step that is exposed transfer, last 10 s", recent.exposed
        )
        size = GaugeMetricFamily("afd_gang_size", "Attention workers a batch, mean of the last 10 s", labels=["role"])
        size.add_metric(["attention"], recent.gang_size)
        yield size

    def _sla_metrics(self) -> Iterable[Metric]:
        admission, latency = self._admission, self._latency
        verdicts = CounterMetricFamily(
            "afd_sla_admissions",
            "Decisions; with policy observe, refused ones were admitted all the same",
            labels=["verdict"],
        )
        verdicts.add_metric(["refused"], admission.num_refused)
        verdicts.add_metric(["admitted"], admission.num_admitted)
        yield verdicts
        yield GaugeMetricFamily(
            "afd_sla_predicted_cycle_seconds", "Predicted TPOT of all that is admitted", admission.cycle_s
        )
        curves = GaugeMetricFamily("afd_latency_model_seconds", "Step time model: coefficient", labels=["stage", "per"])
        for stage, curve, names in (
            ("attention", latency.attention, ("step", "token", "context_token")),
            ("head", latency.head, ("step", "row")),
            ("ffn", latency.ffn, ("step", "token")),
        ):
            for name, value in zip(names, curve.coefficients, strict=True):
                curves.add_metric([stage, name], value)
        curves.add_metric(["transfer", "step"], latency.transfer_s)
        yield curves

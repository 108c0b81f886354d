"""What an FFN worker exports. Read from the engine's totals at scrape time: the hot loop knows no Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.ffn.engine import FFNEngine
from afd.ffn.health import RecentFFN
from afd.worker.data_plane import mesh_metrics
from stepmesh.mesh import Mesh


class FFNMetrics(Collector):
    """Collects at scrape, in the metrics thread; reads plain numbers only."""

    def __init__(self, registry: CollectorRegistry, engine: FFNEngine, mesh: Mesh, recent: RecentFFN):
        self._engine = engine
        self._mesh = mesh
        self._recent = recent
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        totals = self._engine.totals
        stage = CounterMetricFamily("afd_stage_seconds", "Seconds spent per stage", labels=["role", "stage"])
        for name, value in (
            ("ffn", totals.busy_s),
            ("combine", totals.answer_s),
            ("other", totals.other_s),
            ("wait", totals.wait_s),
            ("gang_wait", totals.gang_wait_s),
        ):
            stage.add_metric(["ffn", name], value)
        yield stage
        yield CounterMetricFamily("afd_ffn_batches", "Merged batches computed", value=totals.num_batches)
        yield CounterMetricFamily("afd_ffn_tokens", "Rows computed, all layers", value=totals.num_tokens)
        yield CounterMetricFamily(
            "afd_gang_members",
            "Members of computed batches (/ afd_ffn_batches: gang size)",
            value=totals.num_members,
        )
        yield CounterMetricFamily(
            "afd_gang_full_batches", "Batches with more than one attention worker", value=totals.num_full_gangs
        )
        stragglers = CounterMetricFamily("afd_gang_stragglers", "Gangs that went on without a member", labels=["peer"])
        for rank, count in dict(self._engine.gangs.num_stragglers).items():
            stragglers.add_metric([f"attention/{rank}"], count)
        yield stragglers
        yield from self._pipeline_metrics()
        yield from self._experts()
        yield from mesh_metrics(self._mesh)

    def _pipeline_metrics(self) -> Iterable[Metric]:
        recent = self._recent.look()
        bubble = GaugeMetricFamily(
            "afd_bubble_ratio", "Share of the last 10 s spent waiting while a step was under way", labels=["role"]
        )
        bubble.add_metric(["ffn"], recent.bubble)
        size = GaugeMetricFamily("afd_gang_size", "Attention workers a batch, mean of the last 10 s", labels=["role"])
        size.add_metric(["ffn"], recent.gang_size)
        late = CounterMetricFamily(
            "afd_gang_lateness_seconds", "Time after its gangs' first members, summed over batches", labels=["peer"]
        )
        for rank, seconds in dict(self._engine.lateness.late_s).items():
            late.add_metric([f"attention/{rank}"], seconds)
        score = GaugeMetricFamily(
            "afd_gang_straggler_score", "Share of a step that its gangs waited for it, last 10 s", labels=["peer"]
        )
        for rank, value in recent.stragglers.items():
            score.add_metric([f"attention/{rank}"], value)
        yield from (bubble, size, late, score)

    def _experts(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(
            "afd_expert_tokens", "Rows computed by a routed expert", labels=["layer", "expert"]
        )
        rms = GaugeMetricFamily(
            "afd_expert_output_rms", "Root mean square of an expert's sampled outputs", labels=["layer", "expert"]
        )
        imbalance = GaugeMetricFamily(
            "afd_expert_imbalance", "Tokens of this rank's busiest expert over the mean", labels=["layer"]
        )
        silent = GaugeMetricFamily(
            "afd_experts_silent", "Experts that receive tokens and give nothing beside their layer", labels=["layer"]
        )
        for layer, load in self._engine.expert_loads().items():
            for e, (count, output) in enumerate(zip(load.num_tokens, load.output_rms(), strict=True)):
                tokens.add_metric([str(layer), str(load.first_expert + e)], count)
                if output is not None:
                    rms.add_metric([str(layer), str(load.first_expert + e)], output)
            if load.num_tokens:
                imbalance.add_metric([str(layer)], load.imbalance())
                silent.add_metric([str(layer)], len(load.silent()))
        yield from (tokens, rms, imbalance, silent)

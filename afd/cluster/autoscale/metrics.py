"""What the autoscaler exports. Written by its loop, read by the metrics thread."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from afd.cluster.autoscale.decision import Observation, Recommendation

OUTCOMES = ("applied", "refused", "unanswered")


class AutoscaleMetrics:
    """outcome of a round: applied = a scale target was patched; refused = Kubernetes did not take the patch;
    unanswered = the coordinator did not answer."""

    def __init__(self, registry: CollectorRegistry):
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["role"], registry=registry)

        self._instances = gauge("afd_autoscale_instances", "Workers that there are")
        self._recommended = gauge("afd_autoscale_recommended_instances", "Workers that there should be")
        self._busy = gauge("afd_autoscale_busy_ratio", "Share of the last interval spent computing")
        self._rounds = Counter("afd_autoscale_rounds", "Rounds by outcome", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._rounds.labels(outcome)

    def advised(self, seen: Observation, advice: Recommendation) -> None:
        for role, present, wanted, busy in (
            ("attention", seen.size.num_attention, advice.size.num_attention, seen.attention_busy),
            ("ffn", seen.size.num_ffn, advice.size.num_ffn, seen.ffn_busy),
        ):
            self._instances.labels(role).set(present)
            self._recommended.labels(role).set(wanted)
            self._busy.labels(role).set(busy)

    def count(self, outcome: str) -> None:
        self._rounds.labels(outcome).inc()

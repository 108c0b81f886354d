"""Where a layer's time goes: what the attention workers counted between two looks, as means over layers.

A: combine, attention and dispatch of one layer.  F: the FFN's computing.  transfer: the rest of an exchange, from
dispatch to combine: rows on their way, waiting for the gang, for another stream at the FFN worker, and for the
attention worker to look.  idle: the attention worker had nothing else to do; exposed: of it, while no FFN computed its
rows.  other: between its stages.  head: head and sampling, once a step.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from bench.local import BenchCluster

STAGES = ("attention", "exchange", "ffn", "head", "wait", "look_ahead", "other")
COUNTS = ("afd_exposed_transfer_seconds_total", "afd_exchanges_total", "afd_steps_total", "afd_step_tokens_total")
HEADER = f"{'seqs':>5} {'config':>8} {'rows':>6} " + " ".join(
    f"{title:>8}" for title in ("A us", "F us", "transfer", "idle", "exposed", "other", "head us")
)


@dataclass(frozen=True, slots=True)
class StageSums:
    """Seconds by stage and counts since start, summed over the attention workers of a cluster."""

    seconds: dict[str, float]
    exposed_s: float
    num_exchanges: float
    num_steps: float
    num_tokens: float

    @classmethod
    def of(cls, cluster: BenchCluster) -> StageSums:
        samples: dict[str, float] = {}
        for address in cluster.metrics_addresses("attention"):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    name, _, value = line.rpartition(" ")
                    if name and not line.startswith("#"):
                        samples[name] = samples.get(name, 0.0) + float(value)
        seconds = {stage: samples[f'afd_stage_seconds_total{{role="attention",stage="{stage}"}}'] for stage in STAGES}
        return cls(seconds, *(samples[name] for name in COUNTS))

    def since(self, before: StageSums) -> StageSums:
        return StageSums(
            {stage: self.seconds[stage] - before.seconds[stage] for stage in STAGES},
            self.exposed_s - before.exposed_s,
            self.num_exchanges - before.num_exchanges,
            self.num_steps - before.num_steps,
            self.num_tokens - before.num_tokens,
        )

    def per_layer(self) -> dict[str, float]:
        """Microseconds a layer (head_us: a step), and rows of a mean micro-batch."""
        layer = 1e6 / max(1.0, self.num_exchanges)
        # On a busy host the FFN may have begun before the dispatching worker got to read its clock: never below 0.
        transfer_s = max(0.0, self.seconds["exchange"] - self.seconds["ffn"])
        return {
            "rows": self.num_tokens / max(1.0, self.num_steps),
            "a_us": self.seconds["attention"] * layer,
            "f_us": self.seconds["ffn"] * layer,
            "transfer_us": transfer_s * layer,
            "idle_us": self.seconds["wait"] * layer,
            "exposed_us": self.exposed_s * layer,
            "other_us": self.seconds["other"] * layer,
            "head_us": self.seconds["head"] * 1e6 / max(1.0, self.num_steps),
        }


def stage_row(sequences: int, config: str, means: dict[str, float]) -> str:
    """One line under HEADER."""
    rows, *times = means.values()
    return f"{sequences:>5} {config:>8} {rows:>6.1f} " + " ".join(f"{time:>8.0f}" for time in times)

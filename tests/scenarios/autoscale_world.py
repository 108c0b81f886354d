"""The autoscaler beside a cluster in steady states, as the world of a scenario.

Stage times are the planner's, with noise; what follows from them is learnt, reported and decided by the service's own
code: `LatencyModel`, `CostReporter`, `Observer`, `Adviser`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field

import msgspec

from afd.cluster.autoscale.decision import ALMOST, Adviser, Limits, Policy
from afd.cluster.autoscale.observation import Observer
from afd.messages.membership import ClusterView, Member, MemberStatus, Plan, StatusReply, WorkerInfo
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import max_requests
from afd.plan.pipeline import step_time
from afd.plan.request_rate import BatchLimits, RequestShape, served_rate
from afd.plan.stages import Prefill, RooflineStages, StageTimes
from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.report import CostReporter
from afd.sched.rules import HEADROOM
from afd.types import Topology

EFFICIENCY = Efficiency()
STAGES = RooflineStages(EFFICIENCY)
STREAMS, RANK_SEQS, RANK_ROWS = 3, 256, 256
INTERVAL_S = 15.0
STEPS = 10  # that are measured in an interval
NOISE = 0.05  # standard deviation of a stage, relative
HICCUP, HICCUPS = 3.0, 0.005  # some steps take so many times as long
STABLE = 20  # decisions


@dataclass
class _Worker:
    """What an attention worker says of itself; all of them are alike."""

    model: LatencyModel = field(default_factory=LatencyModel)
    num_running: int = 0
    num_streams: int = STREAMS
    load: StepLoad = field(default_factory=lambda: StepLoad(0, 0, 0))
    num_exchanges: int = 0
    num_gang_members: int = 0
    wait_s: float = 0.0

    def full_step(self) -> StepLoad:
        return self.load


class AutoscaleWorld:
    """Lines: `minute 12: 2A2F should be 3A2F` when the advice changes, and what `settled` is asked for."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._random = random.Random(7)
        self._chip, self._model = load_chips()["h800"], load_models()["step3"]
        self._follows = False
        self._now = 0.0
        self._rate = 0.0
        self._shape = RequestShape(1000, 200)
        self._policy = Policy()
        self._counters: dict[str, float] = {}
        self._busy_s = [0.0, 0.0]
        self._backlog = 0.0
        self._steps_s: deque[float] = deque(maxlen=4)
        self._history: list[Topology] = []

    # -- commands -----------------------------------------------------------------------------------------

    def cluster(self, size: str, model: str = "step3", smallest: str = "1A1F", largest: str = "8A8F") -> None:
        """Servers of eight H800; what may be wished for."""
        self._model = load_models()[model]
        self._limits = Limits(Topology.parse(smallest), Topology.parse(largest))
        self._policy = Policy(max_num_seqs=RANK_SEQS * self._deployment(Topology.parse(size)).ranks_per_instance)
        self._ranks = self._deployment(Topology.parse(size)).ranks_per_instance
        self._observer, self._adviser = Observer(STREAMS), Adviser(self._policy, self._limits)
        self._start(Topology.parse(size))

    def requests(self, prompt: str, answer: str) -> None:
        """Mean tokens of a prompt and of an answer, from now on."""
        self._shape = RequestShape(float(prompt), float(answer))

    def load(self, percent: str, of: str) -> None:
        """So much of what that size serves within the target arrives from now on."""
        self._rate = float(percent.removesuffix("%")) / 100.0 * self._served(Topology.parse(of), self._policy.tpot_s)

    def follow(self) -> None:
        """Whatever is advised is done, from now on."""
        self._follows = True

    def wait(self, minutes: str) -> None:
        for _ in range(round(float(minutes) * 60.0 / INTERVAL_S)):
            self._look()

    def settled(self) -> None:
        """Where the advice has been for the last decisions, and which sizes the planner would take."""
        recent = set(map(str, self._history[-STABLE:]))
        self._said.append(
            f"{STABLE} decisions: {', '.join(sorted(recent))}; the planner takes {', '.join(self._best())}"
        )

    def news(self) -> list[str]:
        said, self._said = self._said, []
        return said

    # -- the autoscaler -----------------------------------------------------------------------------------

    def _look(self) -> None:
        self._pass(INTERVAL_S)
        seen = self._observer.observe(self._status(), self._now)
        if seen is None:
            return
        advice = self._adviser.observe(seen, self._now)
        self._history.append(advice.size)
        if advice.changed:
            verdict = "is right" if advice.size == self._size else f"should be {advice.size}"
            self._said.append(f"minute {self._now / 60:.0f}: {self._size} {verdict}")
        if self._follows and advice.size != self._size:
            self._start(advice.size)

    def _status(self) -> StatusReply:
        size, worker = self._size, self._worker
        costs = CostReporter(worker.model, worker, worker).report(self._now)  # type: ignore[arg-type]
        share = {name: value / size.num_attention for name, value in self._counters.items()}
        stats = {**share, "running": worker.num_running, "waiting": self._backlog / size.num_attention}
        stats |= {"kv_free": 1.0 - self._kv_used, "busy_s": self._busy_s[0]}
        members = [self._member("attention", rank, stats) for rank in range(size.num_attention)]
        members = [msgspec.structs.replace(status, costs=costs) for status in members]
        members += [self._member("ffn", rank, {"busy_s": self._busy_s[1]}) for rank in range(size.num_ffn)]
        live = worker.num_running * size.num_attention + self._backlog
        gateway = {"arrived": self._arrived, "running": live, "queued": 0.0, "finished": 1000.0 if self._rate else 0.0}
        gateway |= {"tpot_p99_ms": 1e3 * self._tpot_s, "ttft_p99_ms": 1e3}
        members.append(self._member("gateway", 0, gateway))
        view = ClusterView(
            "c", 1, 1, size.num_attention, size.num_ffn, "m", "", "hybrid", Plan(max_streams=STREAMS), []
        )
        return StatusReply(view, members, [])

    def _member(self, role: str, rank: int, stats: dict[str, float]) -> MemberStatus:
        info = WorkerInfo(role, f"{role}/{rank}/{self._incarnation if role != 'gateway' else 0}", "", 0, "")
        return MemberStatus(
            Member(info, rank, ready=True), 0.0, 1.0, {key: float(value) for key, value in stats.items()}
        )

    # -- the cluster --------------------------------------------------------------------------------------

    def _start(self, size: Topology) -> None:
        """Every worker is new, and has measured nothing."""
        self._size, self._worker = size, _Worker()
        self._incarnation = len(self._history)
        self._counters = dict.fromkeys(("sampled", "rows", "attended"), 0.0)
        self._busy_s = [0.0, 0.0]
        self._arrived = 0.0 if not self._history else self._arrived
        self._kv_used = self._tpot_s = 0.0
        self._steps_s.clear()
        self._most = self._most_seqs()

    def _pass(self, seconds: float) -> None:
        """An interval in the steady state that its arrivals bring about."""
        self._now += seconds
        shape, arrived = self._shape, self._poisson(self._rate * seconds)
        self._arrived += arrived
        asked = (arrived + self._backlog) * shape.output / seconds
        num_seqs = self._seqs_for(asked)
        cycle_s = self._cycle_s(self._size, num_seqs)
        decoded = min(asked, num_seqs / cycle_s) * seconds
        self._backlog = max(0.0, arrived + self._backlog - decoded / shape.output)
        self._kv_used = min(1.0, num_seqs / self._most)
        self._tpot_s = 0.0
        worker, x = self._worker, self._size.num_attention
        worker.num_running = round(num_seqs / x) if decoded else 0
        worker.load = StepLoad(worker.num_running, worker.num_running * shape.context, worker.num_running)
        self._counters["sampled"] += decoded
        self._counters["rows"] += decoded * shape.num_rows / shape.output
        prefill = shape.prompt * (shape.prompt + 1) / 2
        self._counters["attended"] += decoded / shape.output * (prefill + (shape.output - 1) * shape.context)
        if decoded:
            self._steps_s.append(self._measure(num_seqs))
            self._tpot_s = 1.05 * sum(self._steps_s) / len(self._steps_s)  # of the gateway's last minute
            stage = self._stage(self._size, num_seqs, STREAMS)
            share = decoded * cycle_s / num_seqs * self._model.num_layers * STREAMS / cycle_s
            self._busy_s[0] += share * stage.attention_s
            self._busy_s[1] += share * stage.ffn_s

    def _measure(self, num_seqs: float) -> float:
        """Steps as the worker's clock books them: what an exchange takes is what is left of the step -> mean step."""
        layers, shape, x = self._model.num_layers, self._shape, self._size.num_attention
        streams = max(1, min(STREAMS, round(num_seqs / x)))
        flying = dict[int, tuple[float, float, float]]()  # A, F and the slower way of each stream's step
        total_s = 0.0
        for step in range(STEPS):
            here = num_seqs * self._random.uniform(0.8, 1.2)
            decodes = here / x / streams
            prefill = decodes * (shape.num_rows / (shape.output - 1.0) - 1.0)  # on average
            rows = decodes + prefill * 2.0 * self._random.random()
            stage = self._stage(self._size, here, streams, (rows - decodes) / prefill)
            attended = (rows - decodes) * (shape.prompt + 1) / 2
            head_s = stage.head_s * self._noise()
            attention_s, ffn_s, out_s, back_s = (
                layers * seconds * self._noise()
                for seconds in (stage.attention_s, stage.ffn_s, stage.to_ffn_s, stage.to_attention_s)
            )
            flying[step % streams] = (attention_s + head_s, ffn_s, max(out_s, back_s))
            way_s = attention_s + head_s + ffn_s + out_s + back_s
            took_s = max(way_s, *map(sum, zip(*flying.values(), strict=True)))
            total_s += took_s
            load = StepLoad(rows, decodes * shape.context + attended, decodes)
            exchange_s = took_s - attention_s - head_s
            self._worker.model.observe(
                StepSample(
                    step % streams, load, attention_s, head_s, ffn_s, exchange_s, rows * x, took_s, range(streams)
                )
            )
        return total_s / STEPS

    def _noise(self) -> float:
        return self._random.lognormvariate(0.0, NOISE) * (HICCUP if self._random.random() < HICCUPS else 1.0)

    def _poisson(self, mean: float) -> float:
        return max(0.0, round(self._random.gauss(mean, math.sqrt(mean)))) if mean else 0.0

    # -- what is true -------------------------------------------------------------------------------------

    def _deployment(self, size: Topology) -> Deployment:
        return Deployment(model=self._model, attention_chip=self._chip, ffn_chip=self._chip, topology=size)

    def _stage(self, size: Topology, num_seqs: float, streams: int, filled: float = 1.0) -> StageTimes:
        """filled: prefill beside these decodes, of its mean."""
        deployment, shape = self._deployment(size), self._shape
        ranks = deployment.ranks_per_instance
        decodes = num_seqs / streams / size.num_attention / ranks
        rows = filled * decodes * (shape.num_rows / (shape.output - 1.0) - 1.0)
        prefill = Prefill.of_prompts(max(rows, 1e-6), shape.prompt, max(1.0, ranks * (RANK_ROWS - decodes)))
        return STAGES.times(deployment, shape.context, decodes, prefill)

    def _cycle_s(self, size: Topology, num_seqs: float) -> float:
        streams = max(1, min(STREAMS, round(num_seqs / size.num_attention)))
        return step_time(self._stage(size, num_seqs, streams), streams, self._model.num_layers)

    def _most_seqs(self) -> float:
        """What the KV caches hold."""
        deployment = self._deployment(self._size)
        ranks = deployment.ranks_per_instance * self._size.num_attention
        return min(RANK_SEQS, max_requests(deployment, EFFICIENCY, self._shape.context)) * ranks

    def _seqs_for(self, tokens_per_s: float) -> float:
        """That run together where so many tokens are asked for; at most what fits."""
        low, high = 1.0, self._most_seqs()
        if high / self._cycle_s(self._size, high) < tokens_per_s:
            return high
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if middle / self._cycle_s(self._size, middle) >= tokens_per_s else (middle, high)
        return high

    def _served(self, size: Topology, tpot_s: float) -> float:
        limits = BatchLimits(RANK_SEQS, RANK_ROWS)
        served = served_rate(STAGES, EFFICIENCY, self._deployment(size), self._shape, limits, tpot_s)
        return 0.0 if served is None else served.rate

    def _best(self) -> list[str]:
        """The cheapest that serve the load with as much room as the policy wants; else the one that serves most."""
        rates = {size: self._served(size, HEADROOM * self._policy.tpot_s) for size in self._limits.sizes()}
        enough = [size for size, rate in rates.items() if rate * self._policy.sized_for >= self._rate]
        if not enough:
            enough = [size for size, rate in rates.items() if rate >= ALMOST * max(rates.values())]
        least = min(map(self._policy.cost, enough))
        return [str(size) for size in enough if self._policy.cost(size) == least]

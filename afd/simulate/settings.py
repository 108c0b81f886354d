"""What is simulated: sizes, policies and limits as the service has them, and stage times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afd.sched.policy import Policy
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.loading import LoadTimes
from afd.simulate.planned import Failure, PlannedRollout, PlannedScaling
from afd.simulate.slowdowns import Pace
from afd.simulate.times import StepTimes
from afd.types import Topology

Detail = Literal["ends", "layers"]
AT_ONCE, NO_SLOWDOWNS = LoadTimes(), Pace()
Transfers = Literal["link", "sender", "delay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a simulation depends on. A worker is a whole instance; limits count its ranks together.

    num_blocks: KV blocks of a worker.
    hash_block_tokens: tokens that each of a request's hash_ids names; 0 = prompts share nothing, no prefix cache.
    auto_streams: most streams of a worker that chooses their number; 0 = fixed (`scheduler.num_streams`).
    max_waiting, max_queue: as `attention.max_waiting` and `gateway.max_queue`.
    stops_early: answers end by a stop token, so that the service cannot know their length; else by max_tokens.
    transfers: what one keeps busy: the worker's link (bandwidth), its sender, or nothing (latency alone).
    load: until a new worker serves.
    drain_s: what a worker that leaves has for what it runs, as `gateway.drain_s`.
    pace: which workers are slower than their kind, and when.
    advises: workers measure what steps cost and say so, for the autoscaler.
    detail: "layers" simulates every layer, "ends" the first and the last one.
    """

    topology: Topology
    times: StepTimes
    scheduler: SchedulerConfig
    num_blocks: int
    block_size: int = 32
    hash_block_tokens: int = 0
    auto_streams: int = 0
    policy: Policy = "observe"
    tpot_s: float = 0.05
    ttft_s: float = 5.0
    max_waiting: int = 1024
    max_queue: int = 1024
    gang_window_s: float = 0.01
    recovery_timeout_s: float = 2.0
    request_timeout_s: float = 600.0
    stops_early: bool = False
    max_tokens: int = 0
    transfers: Transfers = "link"
    advises: bool = False
    detail: Detail = "ends"
    failures: tuple[Failure, ...] = ()
    rollouts: tuple[PlannedRollout, ...] = ()
    scalings: tuple[PlannedScaling, ...] = ()
    load: LoadTimes = AT_ONCE
    drain_s: float = 10.0
    pace: Pace = NO_SLOWDOWNS

"""One storm over one running cluster: calm first, then loss after loss under streaming load, then the account."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

import httpx

from bench.storm.account import Happened, Line, Stream, account, table, undisturbed_gaps_s
from bench.storm.gateway_log import placements_of
from bench.storm.plan import Loss
from bench.storm.scene import Scene
from bench.storm.traffic import Traffic
from bench.storm.undisturbed import Undisturbed

BEGIN_S = 60.0
SETTLE_S = 2.0
CALM_WINDOW_S = 3.0
NUM_WORST = 6


class RunningCluster(Protocol):
    """`afd up` with `--log-level debug`: who serves which stream stands in the gateway's log."""

    url: str
    lines: list[str]
    env: dict[str, str]

    @property
    def supervisor_pid(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Load:
    """What streams meanwhile. patience_s: how long the cluster may take to be whole again after a loss."""

    num_users: int = 8
    num_prompts: int = 24
    num_tokens: int = 400
    calm_s: float = 10.0
    patience_s: float = 90.0


@dataclass(slots=True)
class Storm:
    """What came of it.

    each: the lines of single losses, as `happened`.
    num_unplaced: streams of which the gateway's log does not tell who served them.
    standstill_s: how long the observer could not run, in all.
    ended: why it was over before its last loss; "" = it was not.
    num_different: streams whose tokens are not those of most streams with their prompt, by rounding or not.
    """

    streams: list[Stream]
    lines: list[Line]
    each: list[Line]
    undisturbed_s: list[float]
    num_different: int
    num_unplaced: int
    standstill_s: float
    ended: str = ""
    happened: list[Happened] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [f"{stream.error} ({len(stream.ids)} tokens)" for stream in self.streams if stream.error]

    @property
    def num_wrong(self) -> int:
        return sum(stream.num_wrong for stream in self.streams)

    @property
    def text(self) -> str:
        num_lost = sum(bool(stream.error) and not stream.refused for stream in self.streams)
        num_refused = sum(stream.refused for stream in self.streams)
        summary = (
            f"{len(self.happened)} losses, {len(self.streams)} streams: {num_lost} ended in error, "
            f"{num_refused} refused, {self.num_wrong} tokens wrong; "
            f"{self.num_different} streams differ within rounding or are wrong; "
            f"the observer stood still for {self.standstill_s:.1f} s"
        )
        ended = [self.ended] if self.ended else []
        return "\n".join(
            [table(self.lines, self.undisturbed_s), "", summary, *ended, "longest pauses:", *self._worst()]
        )

    def _worst(self) -> list[str]:
        """Losses with the longest pauses, of streams concerned or not."""
        rows = []
        for idx, (event, line) in enumerate(zip(self.happened, self.each, strict=True)):
            own_s, other_s = max(line.pauses_s, default=0.0), max(line.gaps_s, default=0.0)
            what = f"  {idx + 1}. {', '.join(event.loss.targets)}: {line.kind}: {own_s:.2f} s, others {other_s:.2f} s"
            rows.append((max(own_s, other_s), what))
        return [what for _, what in sorted(rows, reverse=True)[:NUM_WORST]]


def prompts_of(num_prompts: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, vocab_size) for _ in range(rng.randint(3, 60))] for _ in range(num_prompts)]


def run_storm(
    cluster: RunningCluster,
    undisturbed: Undisturbed,
    losses: Sequence[Loss],
    load: Load,
    tell: Callable[[str], None] = lambda text: None,
) -> Storm:
    """Blocks until the last stream has ended. tell: a line for each loss."""
    prompts = prompts_of(load.num_prompts, undisturbed.vocab_size)
    model = httpx.get(f"{cluster.url}/v1/models", timeout=10).json()["data"][0]["id"]
    clock = datetime.now()
    midnight_s = (
        time.perf_counter() - (clock - clock.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()
    )
    traffic = Traffic([cluster.url], model, prompts, load.num_tokens, load.num_users, load.patience_s)
    happened: list[Happened] = []
    ended = ""
    with Scene(cluster.supervisor_pid, Path(cluster.env["XDG_RUNTIME_DIR"])) as scene, traffic:
        calm_begin_s = _wait_for_first_tokens(traffic, load.num_users)
        time.sleep(load.calm_s)  # the undisturbed time itself
        calm_end_s = time.perf_counter()
        scene.take_stock()
        for loss in losses:
            ended = _wait(scene, loss, happened, load.patience_s, tell)
            if ended:
                break
            at_s, targets = scene.strike(loss)
            happened.append(Happened(loss, at_s, at_s, None))
            tell(f"{at_s - calm_end_s:7.2f} s  {len(happened)}/{len(losses)}  {', '.join(targets)}: {loss.kind}")
        if happened and not ended:
            ended = _wait(scene, Loss((), delay_s=SETTLE_S), happened, load.patience_s, tell)
    for idx, event in enumerate(happened):
        until_s = happened[idx + 1].at_s if idx + 1 < len(happened) else float("inf")
        happened[idx] = replace(event, until_s=until_s)
    num_different = undisturbed.judge(traffic.streams, prompts)
    placements = placements_of(list(cluster.lines), midnight_s)
    placed = {placement.request_id for placement in placements}
    return Storm(
        traffic.streams,
        account(traffic.streams, placements, happened, traffic.standstills),
        [line for e in happened for line in account(traffic.streams, placements, [e], traffic.standstills)],
        undisturbed_gaps_s(traffic.streams, calm_begin_s, calm_end_s, CALM_WINDOW_S),
        num_different,
        sum(bool(stream.token_s) and stream.request_id not in placed for stream in traffic.streams),
        sum(end - begin for begin, end in traffic.standstills),
        ended,
        happened,
    )


def _wait(scene: Scene, loss: Loss, happened: list[Happened], patience_s: float, tell: Callable[[str], None]) -> str:
    """Until the next loss is due, noting when the cluster was whole after the last one; why there is none, or ""."""
    until_s = time.perf_counter() + (0.0 if loss.hasty else patience_s)
    if not loss.hasty and scene.wait_until_whole(until_s) and happened:
        last = happened[-1]
        happened[-1] = replace(last, whole_s=time.perf_counter())
        tell(f"           whole after {time.perf_counter() - last.at_s:.2f} s")
    time.sleep(loss.delay_s)
    return "" if scene.is_running else "the cluster has ended"


def _wait_for_first_tokens(traffic: Traffic, num_users: int) -> float:
    until_s = time.perf_counter() + BEGIN_S
    while len([stream for stream in list(traffic.streams) if stream.token_s]) < num_users:
        if time.perf_counter() > until_s:
            raise RuntimeError(f"not every user had a token within {BEGIN_S:g} s")
        time.sleep(0.05)
    return time.perf_counter()

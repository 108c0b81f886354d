"""The attention worker's loop: in which order it computes, publishes, learns and reports; views, readiness, drain.

The core is the real one; the engine computes what the test has scripted, one call of `run_once` after another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

from afd.attention.build import Parts
from afd.attention.ffn_side import LocalFfn
from afd.attention.worker import AttentionWorker
from afd.errors import PeerLostError
from afd.messages.membership import ClusterView, Plan
from afd.messages.serving import GatewayMessage, Lease, Refused, Tokens, WorkerMessage
from afd.sched.sequence import Output
from tests.fakes.worker_core import GATEWAY, ScriptedWorker, attention, submit, view


class Link:
    """Messages that wait, and those that were sent, by what they are."""

    def __init__(self, scene: Scene):
        self._scene = scene
        self._log = scene.log
        self.waiting: list[GatewayMessage] = []
        self.has_input = False
        self.seconds_each = 0.0

    def receive(self) -> Iterator[tuple[bytes, GatewayMessage]]:
        while self.waiting:
            self._scene.now += self.seconds_each
            yield GATEWAY, self.waiting.pop(0)

    def send(self, messages: list[tuple[bytes, WorkerMessage]]) -> None:
        for _, message in messages:
            if isinstance(message, Tokens):
                self._log.append("send " + " ".join(f"{chunk.req_id}{chunk.first_idx}" for chunk in message.chunks))
            elif isinstance(message, Refused):
                self._log.append(f"refuse {message.req_id}: {message.reason}")
            else:
                self._log.append("report")

    def wait(self, timeout_s: float) -> None:
        self._log.append("wait for gateways")


class Engine:
    """Each `run_once` plays the next move of the script: "begin", "commit STREAM", "stage", "lost" or "pause", which is
    "lost" behind a minute in which this process stood still; a second passes once the script is over."""

    def __init__(self, scene: Scene, scripted: ScriptedWorker):
        self._scene = scene
        self._log = scene.log
        self._scripted = scripted
        self.scheduler = scripted.core.scheduler
        self.stages = SimpleNamespace(deliver=lambda: self._log.append("learn"))
        self.script: list[str] = []
        self.patience_s = 0.0

    @property
    def in_flight(self) -> bool:
        return bool(self._scripted.in_flight)

    def run_once(self, timeout_s: float) -> list[Output]:
        self.patience_s = timeout_s
        if not self.script:
            self._scene.now += 1.0
            return []
        move = self.script.pop(0)
        self._log.append(move)
        if move == "pause":
            self._scene.now += 60.0
        if move in ("lost", "pause"):
            raise PeerLostError("ffn/0 is lost")
        if move == "begin":
            self._scripted.begin()
        elif move.startswith("commit"):
            stream = int(move.removeprefix("commit") or 0)
            batch = self._scripted.in_flight.pop(stream)
            sampled = {item.seq.req_id: 5 for item in batch.items if item.samples}
            return [Output(progress) for progress in self.scheduler.commit(batch, sampled)]
        return []

    def fail(self) -> None:
        self._log.append("fail")
        for batch in self._scripted.in_flight.values():
            self.scheduler.fail_stream(batch)
        self._scripted.in_flight.clear()


class Cluster:
    """The worker's seat: what the coordinator says, and what it is told."""

    def __init__(self, log: list[str]):
        self._log = log
        self.views = [view(attention(0))]
        self.lost = False
        self.membership = self

    def new_view(self) -> ClusterView | None:
        return self.views.pop() if self.views else None

    def set_draining(self, draining: bool) -> None:
        self._log.append(f"draining {draining}")


class Scene:
    """A worker of a mono cluster whose first view has come, with a gateway that lives."""

    def __init__(self, num_streams: int = 1):
        self.now = 1000.0
        self.log: list[str] = []
        scripted = ScriptedWorker.make(num_streams=num_streams, num_blocks=32, ready=False)
        self.core, self.link, self.cluster = scripted.core, Link(self), Cluster(self.log)
        self.engine = Engine(self, scripted)
        self.health = SimpleNamespace(num_turns=0)
        unused = SimpleNamespace()
        parts = Parts(
            engine=self.engine,
            core=self.core,
            ffn=LocalFfn(),
            latency=unused,
            recent=unused,
            health=self.health,
            start_threads=unused,
            resources=contextlib.ExitStack(),
        )
        self.ready: list[tuple[bool, str]] = []
        self.worker = AttentionWorker(
            parts, self.link, self.cluster, lambda *news: self.ready.append(news), clock=lambda: self.now
        )
        self.turn(tell=[Lease("gw", 60.0)])

    def turn(self, *script: str, tell: Sequence[GatewayMessage] = ()) -> list[str]:
        """One turn of the loop -> what it did, reports left out."""
        self.log.clear()
        self.link.waiting.extend(tell)
        self.engine.script = list(script)
        self.worker.turn(self.now)
        assert not self.engine.script
        return [entry for entry in self.log if entry != "report"]


# -- tokens ---------------------------------------------------------------------------------------------------


def test_a_steps_tokens_leave_behind_the_next_steps_first_stage():
    scene = Scene()
    assert scene.turn("begin", "commit", tell=[submit()]) == ["begin", "commit"]
    assert scene.turn("begin", "commit") == ["begin", "send r0", "learn", "commit"]


def test_the_last_ones_leave_at_once():
    assert Scene().turn("begin", "commit", tell=[submit(max_tokens=1)]) == [
        "begin", "commit", "send r0", "learn", "learn"
    ]  # fmt: skip


def test_with_other_streams_in_flight_they_leave_before_the_next_stage():
    scene = Scene(num_streams=2)
    assert scene.turn("begin", "commit 0", "stage", "commit 1", tell=[submit("a"), submit("b")]) == [
        "begin", "commit 0", "send a0", "learn", "stage", "commit 1"
    ]  # fmt: skip


def test_a_step_without_tokens_is_learnt_of_too():
    """A chunk of a long prompt."""
    scene = Scene()
    scene.cluster.views.append(view(attention(0), plan=Plan(max_step_tokens=2)))
    assert scene.turn("begin", "commit", tell=[submit(prompt=[1] * 20)]) == ["begin", "commit", "learn"]


def test_the_load_is_told_behind_the_tokens():
    scene = Scene()
    scene.turn("begin", "commit", tell=[submit()])
    scene.now += 1.0
    scene.turn("begin", "commit")
    assert scene.log == ["begin", "send r0", "learn", "report", "commit"]


# -- losses ---------------------------------------------------------------------------------------------------


def test_a_lost_peer_holds_no_token_back_and_the_step_runs_again():
    scene = Scene()
    scene.turn("begin", "commit", tell=[submit()])
    assert scene.turn("begin", "lost") == ["begin", "send r0", "learn", "lost", "fail"]
    assert scene.turn("begin", "commit") == ["begin", "commit"]
    assert scene.turn("begin", "commit") == ["begin", "send r1", "learn", "commit", "send r2", "learn", "learn"]


def test_a_pause_of_its_own_takes_none_of_the_time_that_a_lost_peer_has_to_come_back():
    scene = Scene()
    scene.turn("begin", "commit", tell=[submit()])
    scene.turn("begin", "pause")  # longer than recovery_timeout_s
    scene.cluster.views.append(view(epoch=0))
    scene.turn(tell=[Lease("gw", 600.0)])
    scene.now += 60.0  # it stands still once more, in the midst of waiting
    scene.turn()
    assert scene.core.scheduler.get("r") is not None
    scene.cluster.views.append(view(attention(0)))
    assert scene.turn("begin", "commit") == ["begin", "commit"]


def test_readiness_follows_the_ffn_side():
    scene = Scene()
    assert scene.ready[-1] == (True, "")
    scene.cluster.views.append(view(epoch=0))
    scene.turn()
    assert scene.turn(tell=[submit()]) == ["refuse r: not_ready", "wait for gateways", "learn"]
    assert scene.ready[-1] == (False, "waiting for the coordinator's first view")


# -- the rest of a turn ---------------------------------------------------------------------------------------


def test_the_loop_counts_its_turns_for_the_heartbeat():
    scene = Scene()
    scene.turn()
    assert scene.health.num_turns == 2


def test_a_flood_of_messages_does_not_keep_the_running_requests_waiting():
    scene = Scene()
    scene.link.seconds_each = 0.011
    scene.turn("begin", tell=[submit(f"r{idx}", max_tokens=9) for idx in range(3)])
    assert len(scene.link.waiting) == 1
    scene.turn("commit")
    assert not scene.link.waiting


def test_messages_that_wait_keep_the_engine_from_blocking():
    scene = Scene()
    assert scene.turn() == ["wait for gateways", "learn"]
    scene.link.has_input = True
    assert scene.turn() == ["learn"]
    assert scene.engine.patience_s == 0.0


# -- the end --------------------------------------------------------------------------------------------------


def test_a_stopped_worker_finishes_what_runs_and_takes_nothing_new():
    scene, stop = Scene(), threading.Event()
    scene.turn("begin", "commit", tell=[submit(max_tokens=2)])
    stop.set()
    scene.link.waiting.append(submit("late"))
    scene.engine.script = ["begin", "commit"]
    scene.log.clear()
    scene.worker.run(stop, 60.0)
    assert [entry for entry in scene.log if entry != "report"] == [
        "draining True", "refuse late: draining", "begin", "send r0", "learn", "commit", "send r1", "learn", "learn"
    ]  # fmt: skip


def test_a_drain_has_a_deadline():
    scene, stop = Scene(), threading.Event()
    scene.turn("begin", tell=[submit()])
    stop.set()
    begun_s = scene.now
    scene.worker.run(stop, 5.0)  # each turn without news takes a second
    assert 5.0 <= scene.now - begun_s <= 7.0


def test_a_worker_that_was_declared_lost_goes_at_once():
    scene = Scene()
    scene.turn("begin", tell=[submit()])
    scene.cluster.lost = True
    scene.log.clear()
    scene.worker.run(threading.Event(), 60.0)
    assert scene.log == []

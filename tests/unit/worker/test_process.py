"""A worker's process from start to end, with a scripted cluster around it; nothing is seen before it is whole."""

from __future__ import annotations

import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from afd.attention.worker import run_attention_worker
from afd.config import ClusterConfig, resolve_config
from afd.errors import ConfigError
from afd.ffn.worker import run_ffn_worker
from afd.membership.port import SyncFields
from afd.messages.membership import ClusterView, Member, WorkerInfo
from tests.fakes.worker_core import view

SECRET = b"s" * 32


class Cluster:
    """A coordinator that gives rank 0, publishes one view, and asks for the heartbeat's fields without a pause.

    ready: called when the worker says that it is.
    """

    def __init__(self, ready: Callable[[], None] = lambda: None, *, epoch: int = 1):
        self.rank = 0
        self.lost = False
        self.info: WorkerInfo | None = None
        self.news: list[str] = []
        self.beats: list[SyncFields] = []
        self.errors: list[BaseException] = []
        self._ready = ready
        self._epoch = epoch
        self._closed = threading.Event()

    def join(self, info: WorkerInfo, fields: Callable[[], SyncFields]) -> Cluster:
        self.info = info
        self._fields = fields
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()
        return self

    def _beat(self) -> None:
        try:
            while not self._closed.is_set():
                fields = self._fields()
                if not self.beats or fields.stats.keys() != self.beats[-1].stats.keys():
                    self.beats.append(fields)
        except BaseException as error:
            self.errors.append(error)

    def set_loading(self, share: float) -> None:
        self.news.append("loading")

    def set_ready(self, ready: bool) -> None:
        self.news.append(f"ready {ready}")
        self._ready()

    def set_draining(self, draining: bool) -> None:
        self.news.append("draining")

    def on_view(self, callback: Callable[[ClusterView], None]) -> None:
        callback(view(Member(self.info, 0, True), epoch=self._epoch))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.news.append("left")


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    """So that a heartbeat falls between any two lines of the start."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def config(**changes: object) -> ClusterConfig:
    overrides = {"model.name": "dummy:step3-tiny", "model.dtype": "float32", "cluster.topology": "mono"}
    return resolve_config(None, {**overrides, "attention.num_blocks": 64, **changes})


@pytest.mark.parametrize("modelled", ["", "base_ms=1"])
def test_heartbeats_see_a_worker_when_it_is_whole_and_not_before(modelled):
    stop, announced = threading.Event(), []
    cluster = Cluster(stop.set)
    code = run_attention_worker(
        config(**{"attention.modelled": modelled}), SECRET, cluster.join, stop, announced.append
    )
    assert code == 0 and not cluster.errors
    assert cluster.news[-3:] == ["ready True", "draining", "left"]
    assert announced[-1] == {"loading": 1.0}
    assert cluster.info.serving.startswith("tcp://") and cluster.info.metrics
    empty, whole = cluster.beats
    assert empty == SyncFields()
    assert {"running", "waiting", "kv_free", "cycle_ms", "gang_size"} <= whole.stats.keys()


def test_the_probe_says_why_a_worker_is_not_ready_until_it_is():
    stop, seen = threading.Event(), []

    def probe() -> None:
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://{cluster.info.metrics}/readyz", timeout=10)
        seen.append(error.value.read().decode().strip())
        stop.set()

    cluster = Cluster(epoch=0)  # the cluster has not formed
    worker = threading.Thread(
        target=run_attention_worker,
        args=(config(**{"attention.modelled": "base_ms=1"}), SECRET, cluster.join, stop, lambda news: None),
    )
    cluster.set_loading = lambda share: None
    worker.start()
    try:
        while not cluster.beats or cluster.beats[-1] == SyncFields():
            assert worker.is_alive()
        probe()
    finally:
        stop.set()
        worker.join()
    assert seen and "waiting for the coordinator's first view" in seen[0]


def test_a_worker_that_is_stopped_before_it_has_a_rank_leaves():
    stop = threading.Event()
    stop.set()
    cluster = Cluster()
    cluster.rank = -1
    assert run_attention_worker(config(), SECRET, cluster.join, stop, lambda news: None) == 0
    assert cluster.news == ["left"]


def test_an_ffn_worker_in_a_cluster_without_any_is_told_so():
    cluster = Cluster()
    with pytest.raises(ConfigError, match="topology mono has no FFN workers"):
        run_ffn_worker(config(), SECRET, cluster.join, threading.Event(), lambda news: None)
    assert cluster.news == ["left"]

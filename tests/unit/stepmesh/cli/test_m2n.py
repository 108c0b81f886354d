"""`m2n` and `pingpong` run for real, with few and small exchanges; wrong content and wrong arguments do not pass."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest

from stepmesh.cli.m2n import Result, run, text
from stepmesh.cli.m2n_experiment import Experiment, parse_size
from stepmesh.cli.m2n_rank import _Content
from stepmesh.cli.main import main
from stepmesh.errors import ConfigError, TransportError
from stepmesh.layout import PayloadLayout
from stepmesh.types import WireDtype
from tests.contract.world import Holdings

SMALL = ["--sizes", "0,64,8K", "--count", "5", "--timeout", "30"]


def experiment(**changes: object) -> Experiment:
    words: dict[str, object] = {
        "ranks": "1x1", "transports": "shm", "sizes": "64", "back": "1", "count": 3, "host": "127.0.0.1",
        "timeout_s": 30.0,
    }  # fmt: skip
    return Experiment.parse(**(words | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1", 64), ("64", 64), ("8K", 8192), ("1M", 1 << 20), ("917504", 917504)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ranks": "2"}, "say MxN"),
        ({"ranks": "0x1"}, "say MxN"),
        ({"ranks": "129x1"}, "1..128"),
        ({"transports": "pigeon"}, "'pigeon' is not one of"),
        ({"transports": "inproc"}, "'inproc' is not one of"),
        ({"sizes": "65M"}, "up to 64M"),
        ({"sizes": "lots"}, "'lots' is not a number"),
        ({"back": "3"}, "is not 1 or 2"),
        ({"count": 0}, "must be positive"),
    ],
)
def test_wrong_words_are_named(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        experiment(**change)


def test_ranks_of_other_hosts_need_a_place_and_a_key() -> None:
    with pytest.raises(ConfigError, match="say where they meet"):
        run(experiment(), secret=b"", at=None, run_ranks="ffn/0")
    with pytest.raises(ConfigError, match="common key"):
        run(experiment(), secret=b"short", at="10.0.0.1:7000", run_ranks="ffn/0")
    with pytest.raises(ConfigError, match="'ffn/9' is none of attention/0, ffn/0"):
        run(experiment(), secret=b"", at=None, run_ranks="ffn/9")
    with pytest.raises(ConfigError, match="no HOST:PORT"):
        run(experiment(), secret=b"x" * 16, at="7000", run_ranks="ffn/0")


def test_content_differs_between_exchanges_and_senders() -> None:
    content = _Content(1, PayloadLayout(16, 8, 0, WireDtype.FP32, WireDtype.FP32), WireDtype.FP32)
    first = content.rows(3, 0, 0, 1)
    assert first.shape == (3, 16)
    for numbers in ((0, 0, 2), (1, 0, 1), (0, 1, 1)):
        assert not np.array_equal(first, content.rows(3, *numbers))


@pytest.fixture(autouse=True)
def tracker() -> None:
    """The first spawn starts a resource tracker that stays: not ours to count."""
    resource_tracker.ensure_running()


def test_many_ranks_over_two_transports(capsys: pytest.CaptureFixture[str]) -> None:
    before = Holdings.now()
    assert main(["m2n", "--ranks", "2x1", "--transport", "shm,tcp", "--back", "2", "--json", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = [Result(**fields) for fields in json.loads(lines[-1])["results"]]
    assert [(r.carried_by, r.out_bytes, r.back_bytes) for r in results] == [
        (transport, size, 2 * size) for transport in ("shm", "tcp") for size in (0, 64, 8192)
    ]
    assert all(0 < r.p50_us <= r.p99_us and r.exchanges == 5 for r in results)
    assert lines[:-1] == [text(result) for result in results]
    assert Holdings.now().fds == before.fds


def test_two_hosts_meet(tmp_path: Path) -> None:
    """Each "host" is a process that starts only its own ranks, in any order."""
    secret = tmp_path / "secret"
    secret.write_text("a key for the two of them\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = [sys.executable, "-m", "stepmesh", "pingpong", "--at", f"127.0.0.1:{port}", "--secret-file", str(secret)]
    common += ["--sizes", "64", "--count", "3", "--timeout", "30"]
    hosts = [
        subprocess.Popen([*common, "--run-ranks", rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in ("ffn/0", "attention/0")
    ]
    try:
        shown = [host.communicate(timeout=60)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert [host.returncode for host in hosts] == [0, 0], shown
    assert shown[0] == ""
    assert shown[1].count("p50") == 1


def test_a_rank_that_cannot_run_is_named_and_none_is_left() -> None:
    before = Holdings.now()
    with pytest.raises(TransportError, match=r"ffn/0: .*cannot listen on 203\.0\.113\.7"):
        run(experiment(ranks="1x1", transports="tcp", host="203.0.113.7"), secret=b"", at=None, run_ranks=None)
    assert Holdings.now().fds == before.fds
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any(b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children)

"""bench/compare: peers read without their engines; a peer's process answers, is stopped between rounds, ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.compare.peer_process import PeerProcess
from bench.compare.peers import PEERS
from bench.compare.peers.peer import Peer, Setup

ROOT = Path(__file__).parents[3]
SETUP = Setup("model", "bfloat16", 2, 8, 64)
WORKER = """
import json, sys
if sys.argv[-2] == "silent": sys.exit("no such model")
print(json.dumps({"version": json.loads(sys.argv[-1])["model"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    assert request["drawing"] == {"temperature": 0.0, "top_p": 1.0}
    ids = [[sum(prompt)] * request["output_len"] for prompt in request["prompts"]]
    print(json.dumps({"seconds": 0.5, "ids": ids}), flush=True)
"""


def fake_interpreter(folder: Path) -> Path:
    """Runs WORKER whatever module it is told to run."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {worker} "$@"\n')
    python.chmod(0o755)
    return python


def peer_named(label: str) -> type[Peer]:
    return type("Fake", (Peer,), {"name": label})


def test_the_peers_folder_needs_the_standard_library_only():
    code = "import bench.compare.worker, sys; assert not {'torch', 'numpy', 'zmq', 'afd'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=60)


@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_says_how_to_make_its_environment(name):
    assert f"ENVIRONMENTS/{name}" in (sys.modules[PEERS[name].__module__].__doc__ or "")


def test_a_round(tmp_path):
    with PeerProcess("fake", peer_named("fake"), fake_interpreter(tmp_path), SETUP) as process:
        assert process.version == "model"
        outcome = process.run_round([[1, 2], [3, 4]], 3)
        assert outcome.ids == [[3, 3, 3], [7, 7, 7]]
        assert outcome.tokens_per_s == 2 * 3 / 0.5
        pid = process.pid
    assert not psutil.pid_exists(pid)


def test_it_is_stopped_between_rounds(tmp_path):
    with PeerProcess("fake", peer_named("fake"), fake_interpreter(tmp_path), SETUP) as process:
        for _ in range(2):
            process.run_round([[1]], 1)
            waited = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert waited is not None and waited.si_code == os.CLD_STOPPED


def test_one_that_ends_says_why(tmp_path):
    begun = time.monotonic()
    with (
        pytest.raises(SystemExit, match=r"silent ended:\nno such model"),
        PeerProcess("silent", peer_named("silent"), fake_interpreter(tmp_path), SETUP),
    ):
        pass
    assert time.monotonic() - begun < 30

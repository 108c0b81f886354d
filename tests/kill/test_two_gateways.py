"""Two gateways behind one list of addresses: one is killed, the other one drained; clients go on at the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from afd.cluster.run_file import RunInfo
from afd.membership.client import CoordinatorClient
from afd.messages.keys import grpc_token
from bench.storm.run import prompts_of
from bench.storm.traffic import Traffic
from bench.storm.undisturbed import Undisturbed
from tests.e2e.conftest import STEP3_TINY
from tests.e2e.local_cluster import LocalCluster, eventually

MODEL = ("--model", STEP3_TINY, "--dtype", "float32", "--topology", "1A1F", "--set", "gateway.drain_s=60")
NUM_TOKENS = 40


@contextmanager
def second_gateway(cluster: LocalCluster, secret_file: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A gateway of its own beside `afd up`: process and URL."""
    [run_file] = (cluster.run_dir / "afd").glob("*.json")
    run = msgspec.json.decode(run_file.read_bytes(), type=RunInfo)
    command = [sys.executable, "-m", "afd", "gateway", "--port", "0", "--coordinator", run.coordinator]
    process = subprocess.Popen([*command, "--secret-file", str(secret_file), *MODEL], env=cluster.env)
    client = CoordinatorClient(run.coordinator, grpc_token(bytes.fromhex(run.secret)))
    try:

        def address() -> str:
            infos = [status.member.info for status in client.status().members if status.member.ready]
            return next((info.metrics for info in infos if info.pid == process.pid), "")

        yield process, f"http://{eventually(address, 60, 'the second gateway is ready')}"
    finally:
        client.close()
        process.kill()
        process.wait(10)


@pytest.mark.timeout(300)
def test_one_is_killed_and_the_other_drained(tmp_path):
    secret_file = tmp_path / "secret"
    secret_file.write_text(os.urandom(32).hex())
    secret_file.chmod(0o600)
    undisturbed = Undisturbed(STEP3_TINY)
    prompts = prompts_of(8, undisturbed.vocab_size)
    with (
        LocalCluster(tmp_path, *MODEL, "--secret-file", str(secret_file)) as cluster,
        second_gateway(cluster, secret_file) as (second, second_url),
        Traffic([cluster.url, second_url], cluster.model, prompts, NUM_TOKENS, num_users=4) as traffic,
    ):

        def running(server: int) -> bool:
            return sum(s.server == server and bool(s.token_s) and not s.ended_s for s in traffic.streams) >= 2

        def num_begun(server: int, since_s: float) -> int:
            return sum(s.server == server and s.sent_s > since_s and bool(s.token_s) for s in traffic.streams)

        eventually(lambda: running(0) and running(1), 30, "streams at both gateways")
        os.kill(cluster.pid_of("gateway"), signal.SIGKILL)
        killed_s = time.perf_counter()
        eventually(lambda: num_begun(1, killed_s) >= 3, 60, "clients of the killed one go on at the other one")
        eventually(lambda: running(1), 60, "streams at the second gateway")
        second.send_signal(signal.SIGTERM)
        drained_s = time.perf_counter()
        assert second.wait(90) == 0, "a drained gateway ends by itself"
        eventually(lambda: num_begun(0, drained_s) >= 3, 60, "clients of the drained one go on at the first one")
    undisturbed.judge(traffic.streams, prompts)
    assert not sum(stream.num_wrong for stream in traffic.streams)
    begun = [stream for stream in traffic.streams if stream.token_s]
    assert [stream.error for stream in begun if stream.server == 1 and stream.error] == []
    lost = [stream for stream in begun if stream.server == 0 and stream.error]
    assert all(stream.sent_s < killed_s <= stream.ended_s for stream in lost) and len(lost) <= 2

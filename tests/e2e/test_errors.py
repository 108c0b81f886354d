"""What goes wrong around a cluster: a clear line that names the cause, nothing hangs, nothing else breaks."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import STEP3_TINY
from tests.e2e.local_cluster import LocalCluster
from tests.fakes.warm_process import afd

MODEL = ("--model", STEP3_TINY, "--dtype", "float32")


def one_error_line(*args: str, within_s: float = 30) -> str:
    """The command fails with exactly one error line and no traceback."""
    exit_code, output = afd([*args], {**os.environ, "PYTHONWARNINGS": ""}, within_s)
    assert exit_code == 2, (exit_code, output)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, output
    return errors[0]


def secret_file(path: Path, fill: str) -> str:
    path.write_text(fill * 64)
    path.chmod(0o600)
    return str(path)


def listeners(cluster: LocalCluster, pid: int | None = None) -> set[tuple[str, int]]:
    """Every TCP address that a process of the cluster (or only the one of that pid) listens on."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in cluster.members
        if pid in (None, process.pid)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_garbage_on_every_port_disturbs_nobody(tmp_path, reference):
    rng = random.Random(0)
    probes = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        rng.randbytes(5000),
        b"\xff" * 64,
        b"STPM" + rng.randbytes(200),
    ]
    with LocalCluster(tmp_path, *MODEL, "--topology", "1A1F", "--transport", "tcp") as cluster:
        addresses = listeners(cluster)
        assert len(addresses) >= 5, "gateway, coordinator, serving socket, mesh, metrics"
        half_open = contextlib.ExitStack()
        for address in addresses:
            half_open.enter_context(socket.create_connection(address, 5))
        for address in addresses:
            for probe in probes:
                with socket.create_connection(address, 5) as connection:
                    connection.sendall(probe)
        prompt = [3, 1, 4, 1, 5]
        reference.check(STEP3_TINY, prompt, cluster.greedy_ids(prompt, 16), 16)
        half_open.close()


def test_two_clusters_on_one_host_do_not_meet(tmp_path, reference):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        LocalCluster(tmp_path / "one", *MODEL, "--topology", "1A1F") as one,
        LocalCluster(tmp_path / "two", *MODEL, "--topology", "1A1F") as two,
    ):
        prompt = [2, 7, 1, 8]
        for cluster in (one, two):
            reference.check(STEP3_TINY, prompt, cluster.greedy_ids(prompt, 16), 16)
            assert len(cluster.status()["members"]) == 3


def test_workers_that_do_not_belong_are_refused_by_name(tmp_path):
    """A wrong secret, another model, another dtype: one line each; the cluster goes on."""
    right, wrong = secret_file(tmp_path / "right", "a"), secret_file(tmp_path / "wrong", "b")
    with LocalCluster(tmp_path, *MODEL, "--topology", "1A1F", "--secret-file", right) as cluster:
        [log_line] = [line for line in cluster.lines if "coordinator listens on" in line]
        coordinator = re.search(r"listens on ([\d.]+:\d+)", log_line)[1]
        joining = ("--coordinator", coordinator, "--topology", "1A1F")
        line = one_error_line("ffn", *MODEL, *joining, "--secret-file", wrong)
        assert "secret" in line
        other = ("--model", "dummy:step3-tiny", "--dtype", "float32")
        line = one_error_line("ffn", *other, *joining, "--secret-file", right)
        assert "model" in line
        other = ("--model", STEP3_TINY, "--dtype", "bfloat16")
        line = one_error_line("attention", *other, *joining, "--secret-file", right)
        assert "dtype" in line
        assert len(cluster.greedy_ids([1, 2, 3], 4)) == 4


def test_a_port_in_use_is_named_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_error_line("up", *MODEL, "--port", str(port))
        assert str(port) in line and "in use" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "no-such-model"), ["no-such-model"]),
        (("--model", "dummy:no-such-preset"), ["no-such-preset"]),
        (("--topology", "0A1F"), ["0A1F"]),
        (("--topology", "2X1F"), ["2X1F"]),
        (("--set", "attention.block_sise=16"), ["block_sise"]),
        (("--device", "cuda"), ["cuda"]),
        (("--config", "/does/not/exist.toml"), ["/does/not/exist.toml"]),
    ],
)
def test_a_wrong_flag_is_one_line(args, words):
    line = one_error_line("up", *args)
    assert all(word in line for word in words)


def test_a_truncated_weight_file_is_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(STEP3_TINY, folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    line = one_error_line("up", "--model", str(folder), "--port", "0")
    assert "model.safetensors" in line


def test_an_unknown_key_in_the_file_is_named(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("[gateway]\nprot = 8000\n")
    line = one_error_line("up", "--config", str(path))
    assert "prot" in line and str(path) in line

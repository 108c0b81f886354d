"""The limit on open files: raised in every role, and a line in the log where it stays too low."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from afd.cluster.launch import files_needed
from afd.config import resolve_config

ROOT = Path(__file__).resolve().parents[3]
ROLE = """
import resource, sys
from afd.cluster.launch import RoleLaunch
from afd.cluster.role_process import run_role
from afd.config import resolve_config
def entry(context):
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    return 0
config = resolve_config(None, {"gateway.max_connections": 300})
sys.exit(run_role(RoleLaunch(sys.argv[1], 0, config, "ab" * 16), entry))
"""


def limited(soft: int, hard: int, script: str, *args: str) -> tuple[str, str]:
    """Output and errors of a Python process with these limits."""
    command = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, "-c", script, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("role", ["coordinator", "attention", "ffn", "gateway"])
def test_every_role_raises_its_limit(role: str) -> None:
    assert limited(64, 600, ROLE, role) == ("600 600", "")


def test_a_limit_that_stays_too_low_is_said_with_the_number_needed() -> None:
    output, errors = limited(64, 200, ROLE, "gateway")
    assert output == "200 200"
    assert errors.count("\n") == 1
    for part in ("gateway/0 needs 428 open files", "the limit is 200", "ulimit -Hn 428"):
        assert part in errors
    assert limited(64, 200, ROLE, "ffn") == ("200 200", "")


def test_more_workers_need_more_files() -> None:
    small, large = (resolve_config(None, {"cluster.topology": topology}) for topology in ("1A1F", "64A64F"))
    for role in ("coordinator", "attention", "ffn", "up"):
        assert files_needed(role, small) < files_needed(role, large)

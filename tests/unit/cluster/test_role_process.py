"""The frame of a role's process: exit codes, signals, deadlines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from afd.cluster.launch import EXIT_CONFIG, EXIT_FAILURE, EXIT_LOST
from afd.cluster.role_process import exit_code_of
from afd.errors import AfdError, ConfigError, CoordinatorError, ModelError, PeerLostError
from afd.membership.thread import MembershipLostError

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 20.0
SCRIPT = """
import sys, threading
from afd.cluster import role_process
from afd.cluster.launch import RoleLaunch
from afd.config import resolve_config
from afd.membership.thread import MembershipLostError
role_process.STOP_MARGIN_S = role_process.FATAL_LIMIT_S = 0.1
config = resolve_config(None, {{"gateway.drain_s": 0.1}})
def entry(context):
    print("running", flush=True)
{body}
launch = RoleLaunch("ffn", 0, config, "ab" * 16, supervisor_pid={supervisor_pid})
sys.exit(role_process.run_role(launch, entry))
"""


def start(body: str, *, supervised: bool = False) -> subprocess.Popen[str]:
    indented = "\n".join("    " + line for line in body.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=indented, supervisor_pid=os.getpid() if supervised else 0)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=WAIT_S)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(""), EXIT_CONFIG),
        (ModelError(""), EXIT_CONFIG),
        (CoordinatorError(""), EXIT_CONFIG),
        (MembershipLostError(""), EXIT_LOST),
        (PeerLostError(""), EXIT_FAILURE),
        (AfdError(""), EXIT_FAILURE),
    ],
)
def test_exit_codes_say_who_has_to_act(error: AfdError, code: int) -> None:
    assert exit_code_of(error) == code


def test_sigterm_asks_for_a_graceful_stop() -> None:
    process = start("context.stop.wait()\nprint('drained', flush=True)\nreturn 0")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_the_kernel_may_say_more_than_once_that_the_supervisor_is_gone() -> None:
    body = "context.stop.wait()\nprint('stopping', flush=True)\nsys.stdin.readline()\nreturn 0"
    process = start(body, supervised=True)
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None and process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGHUP)
    assert end(process)[0] == 0


def test_a_second_signal_ends_at_once() -> None:
    process = start("context.stop.wait()\nprint('stopping', flush=True)\nthreading.Event().wait()")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] in (128 + signal.SIGTERM, EXIT_FAILURE)  # or its deadline was faster


def test_a_process_that_does_not_stop_is_ended_by_its_deadline() -> None:
    process = start("threading.Event().wait()")
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == EXIT_FAILURE and "did not stop within" in errors


def test_the_cluster_letting_go_ends_even_a_stuck_process() -> None:
    process = start("context.on_fatal(MembershipLostError('declared lost'))\nthreading.Event().wait()")
    code, errors = end(process)
    assert code == EXIT_LOST and "after: declared lost" in errors


def test_the_cluster_letting_go_is_the_exit_code_of_a_clean_end() -> None:
    process = start("context.on_fatal(MembershipLostError('declared lost'))\ncontext.stop.wait()\nreturn 0")
    code, errors = end(process)
    assert code == 1 and "MembershipLostError: declared lost" in errors, "the command line turns it into one line"


def test_a_bug_is_logged_with_its_trace() -> None:
    code, errors = end(start("raise KeyError('a bug')"))
    assert code == EXIT_FAILURE and "ffn/0 failed" in errors and "Traceback" in errors


def test_no_thread_of_the_frame_outlives_the_test_process() -> None:
    assert {thread.name for thread in threading.enumerate()} & {"stop-deadline", "supervisor-watch"} == set()

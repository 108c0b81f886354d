"""A peer as a contestant: its process, asked over pipes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from bench.compare.contestant import Outcome
from bench.compare.peers.peer import Peer, Setup
from bench.drawing import GREEDY, Drawing

ROOT = Path(__file__).parents[2]
START_S = 390.0  # vLLM compiles the model when it starts for the first time
ROUND_S = 300.0
CLOSE_S = 20.0


class PeerProcess:
    """A peer in a process of its own, stopped (SIGSTOP) except while it starts and runs: it shares our cores.

    SystemExit with the end of its log when it does not answer.
    """

    def __init__(self, label: str, peer: type[Peer], python: Path, setup: Setup):
        self.name = label
        self._command = [str(python), "-m", "bench.compare.worker", peer.name, json.dumps(asdict(setup))]
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), **peer.environment}

    def __enter__(self) -> PeerProcess:
        self._log = tempfile.TemporaryFile("w+")
        # A process group of its own can be stopped as a whole; within our session, so that the kernel wakes and ends
        # it should this process be killed while it is stopped.
        self._process = subprocess.Popen(
            self._command, env=self._env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, process_group=0,
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            self.version = self._answer(START_S)["version"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing = GREEDY) -> Outcome:
        self.resume()
        request = {"prompts": prompts, "output_len": output_len, "drawing": asdict(drawing)}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answer(ROUND_S)
        finally:
            self.pause()
        return Outcome(len(prompts) * output_len / answer["seconds"], answer["ids"])

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def _answer(self, timeout_s: float) -> dict:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            why = "ended" if ready else f"did not answer in {timeout_s:.0f} s"
            self._log.seek(0)
            raise SystemExit(f"{self.name} {why}:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def __exit__(self, *exc: object) -> None:
        with suppress(ProcessLookupError):  # it has ended
            self.resume()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(CLOSE_S)
        self._process.stdout.close()
        self._log.close()

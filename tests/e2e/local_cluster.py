"""A real cluster of real processes (`afd up`) for the end-to-end tests, and what a client needs to talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from tests.e2e import warm_start
from tests.fakes.warm_process import WarmProcess, afd

START_S = 90.0
STOP_S = 20.0


class LocalCluster:
    """`with LocalCluster(tmp_path, "--topology", "1A1F") as cluster: cluster.complete(...)`.

    Ends with Ctrl-C and checks that nothing is left: no process, no file in the run directory.
    cold: by the command itself, as a user starts it (see warm_start.py).
    """

    def __init__(self, tmp_path: Path, *args: str, toml: str = "", expect_exit: int | None = 0, cold: bool = False):
        self.run_dir = tmp_path / "run"
        self.run_dir.mkdir(mode=0o700, exist_ok=True)
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(self.run_dir), "PYTHONWARNINGS": ""}
        command = ["up", "--port", "0", *args]
        if toml:
            path = tmp_path / "cluster.toml"
            path.write_text(toml)
            command += ["--config", str(path)]
        self._command = command
        self._cold = cold
        self._expect_exit = expect_exit
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self.started_s = 0.0

    def __enter__(self) -> LocalCluster:
        begun = time.monotonic()
        self.process = self._start_cold() if self._cold else WarmProcess(warm_start.up, self._command, self.env)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_S) or not self.url:
            self._end()
            raise AssertionError("the cluster did not get ready:\n" + "\n".join(self.lines[-60:]))
        self.started_s = time.monotonic() - begun
        self.members = self._all_processes()
        return self

    def _start_cold(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "afd", *self._command]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            match = re.search(r"(http://[\d.]+:\d+)", line)
            if match and not self.url:
                self.url = match[1]
            if self.url and "curl" in line:
                self._ready.set()
        self._ready.set()

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self._end()
        if exc[0] is not None:
            print("\n".join(self.lines[-80:]))
            return
        if self._expect_exit is not None:
            assert self.process.returncode == self._expect_exit, "\n".join(self.lines[-40:])
        self.assert_nothing_left()

    def _end(self) -> None:
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait(5)
            raise AssertionError("the cluster did not stop:\n" + "\n".join(self.lines[-60:])) from None
        finally:
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def _all_processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def assert_nothing_left(self, within_s: float = 5.0) -> None:
        """No process of the cluster lives, and nothing lies in its run directory."""
        _, alive = psutil.wait_procs(self.members, timeout=within_s)
        assert not alive, f"still alive: {[p.cmdline() for p in alive]}"
        left = [str(path) for path in self.run_dir.rglob("*") if not path.is_dir()]
        assert not left, f"left behind: {left}"

    @property
    def supervisor_pid(self) -> int:
        return self.process.pid

    def pid_of(self, role: str, rank: int | None = None) -> int:
        """Process id of the newest process of a role ("attention", 1)."""
        for process in reversed(self._all_processes()[1:]):
            # A title that was set is one word; a process of a warm start has a name, and the words of its origin.
            words = " ".join([process.name()] if " " in process.name() else process.cmdline()).split()
            if role in words and (rank is None or str(rank) in words):
                return process.pid
        raise AssertionError(f"no {role} process: {[p.cmdline() for p in self._all_processes()]}")

    # -- the client -----------------------------------------------------------------------------------------

    def complete(self, prompt, max_tokens=16, **body):
        """POST /v1/completions, greedy unless told otherwise -> the parsed answer (an HTTP error raises)."""
        payload = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, **body}
        payload.setdefault("model", self.model)
        answer = httpx.post(f"{self.url}/v1/completions", json=payload, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def greedy_ids(self, prompt, max_tokens=16, **body) -> list[int]:
        return self.complete(prompt, max_tokens, ignore_eos=True, **body)["choices"][0]["token_ids"]

    def greedy_ids_of_all(self, prompts, max_tokens=16, workers=64, **body) -> list[list[int]]:
        """All prompts at once."""
        lengths = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        with ThreadPoolExecutor(min(workers, len(prompts))) as pool:
            return list(
                pool.map(lambda pair: self.greedy_ids(pair[0], pair[1], **body), zip(prompts, lengths, strict=True))
            )

    @property
    def model(self) -> str:
        if not hasattr(self, "_model"):
            self._model = httpx.get(f"{self.url}/v1/models", timeout=10).json()["data"][0]["id"]
        return self._model

    def stream(self, prompt, max_tokens=64, **body):
        """Yield the data of each SSE event (parsed JSON, or "[DONE]"); closing the generator disconnects."""
        payload = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        payload.update({"ignore_eos": True, "return_token_ids": True, **body})
        with httpx.stream("POST", f"{self.url}/v1/completions", json=payload, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    yield data if data == "[DONE]" else json.loads(data)

    def status(self) -> dict:
        """`afd status --json`."""
        exit_code, output = afd(["status", "--json"], self.env, 30)
        assert exit_code == 0, output
        return json.loads(output)

    def metrics(self, role: str, rank: int = 0) -> dict[str, float]:
        """Samples of one worker's /metrics, labels included in the key; of the gateway with role "gateway"."""
        if role == "gateway":
            address = self.url.removeprefix("http://")
        else:
            [address] = [
                m["member"]["info"]["metrics"]
                for m in self.status()["members"]
                if m["member"]["info"]["role"] == role and m["member"]["rank"] == rank
            ]
        text = httpx.get(f"http://{address}/metrics", timeout=10).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}


def eventually(condition, within_s: float, what: str):
    """Poll until true; the value. Deadline, not a sleep: fails loudly."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {within_s} s: {what}")

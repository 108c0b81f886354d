"""Many questions, each answered in a process of its own, of which one alone imported what they need."""

from __future__ import annotations

import subprocess
import sys

_LOOP = """
import os, sys
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        print(answer(line.removesuffix("\\n")), flush=True)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
END_S = 60.0


class Forks:
    """`with Forks("def answer(question): ...") as forks: forks.ask("question")`.

    code: run once. It defines `answer`, one line of text for one line of text, and starts no thread.
    """

    def __init__(self, code: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code + _LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> str:
        """The answer. Fails when there is none, or more lines than one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        lines: list[str] = []
        while not (line := self._process.stdout.readline()).startswith("ended "):
            assert line, "the process has ended"
            lines.append(line.removesuffix("\n"))
        assert (line, len(lines)) == ("ended 0\n", 1), f"exit code or signal: {line}answer: {lines}"
        return lines[0]

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        exit_code = self._process.wait(END_S)
        self._process.stdout.close()
        assert exit_code == 0

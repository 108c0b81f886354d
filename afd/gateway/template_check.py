"""Is a model's chat template usable? Tried on a short conversation at start, in a process that can be stopped.

A template is a program from a stranger: a few characters of it loop for ever, or for ever while they are compiled.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from afd.errors import ModelError, RequestError
from afd.gateway.templating import BAD_TEMPLATE, ChatTemplate

CHECK_S = 20.0  # most of it for a fresh interpreter on a busy machine
MAX_MEMORY_BYTES = 512 << 20
SAMPLE = [{"role": "user", "content": "Hello"}]
SAMPLE_CHARS = 1 << 20


def check_template(
    sources: Mapping[str, str], special_tokens: Mapping[str, str], *, timeout_s: float = CHECK_S
) -> None:
    """ModelError when the template is not valid, or does not come to an end. One that refuses the sample is usable."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import child; child({int(timeout_s) + 1})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=msgspec.json.encode((sources, special_tokens)),
            capture_output=True,
            timeout=timeout_s,
            process_group=0,  # Ctrl-C is the gateway's
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"does not come to an end within {timeout_s:g} s; /v1/completions works without it"
        raise ModelError(f"the model's chat template {problem}") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(f"the process that tries the model's chat template ended with {done.returncode}: {last}")
    problem = done.stdout.decode()
    if problem:
        raise ModelError(problem)


def child(limit_s: int) -> None:
    """Read sources and special tokens from standard input, write what is wrong with them.

    limit_s: if nobody waits.
    """
    signal.alarm(limit_s)
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    sources, special_tokens = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[dict[str, str], dict[str, str]])
    try:
        ChatTemplate(sources, special_tokens).render(SAMPLE, max_chars=SAMPLE_CHARS)
    except RequestError as error:
        if error.code in (BAD_TEMPLATE, "context_length_exceeded"):
            sys.stdout.write(str(error))

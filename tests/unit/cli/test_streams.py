"""What a command is started with: closed streams, a locale that cannot show its words."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from afd.cli.parser import make_streams_usable
from tests.fakes.long_model import write_long_llama

AFD = f"{sys.executable} -m afd"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed: str) -> None:
    done = shell(f"{AFD} up --model dummy:nothing --dry-run {closed}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("unknown preset" in done.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_locale_cannot_show_are_escaped(encoding: str) -> None:
    done = shell(f"{AFD} up --model dummy:日本 --dry-run", PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 2 and "\\u65e5\\u672c" in done.stderr
    done = shell(f"{AFD} up --model dummy:llama-tiny --served-model-name 日本 --dry-run", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "\\u65e5\\u672c" in done.stdout


def test_errors_are_json_where_the_log_is() -> None:
    done = shell(f"{AFD} up --log-format json --model dummy:nothing")
    [line] = done.stderr.splitlines()
    assert "unknown preset" in json.loads(line)["message"]
    done = shell(f"{AFD} up --set log.format=json --model dummy:llama-tiny --secret-file /nowhere")
    [line] = done.stderr.splitlines()
    assert "secret file" in json.loads(line)["message"]


class Seekless(io.TextIOWrapper):
    def reconfigure(self, **options: object) -> None:  # type: ignore[override]
        raise OSError(29, "Illegal seek")


def test_a_stream_for_reading_and_writing_over_a_pipe_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Seekless(io.BytesIO()))
    make_streams_usable()


@pytest.mark.parametrize("command", ["up", "gateway --coordinator 127.0.0.1:1"])
def test_what_a_model_is_warned_about_is_json_too(tmp_path: Path, command: str) -> None:
    folder = write_long_llama(tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    done = shell(f"{AFD} {command} --dry-run --log-format json --model {folder}")
    assert done.returncode == 0
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert any("tokenizer.model is not read" in message for message in messages)

"""`afd chat`: where the API key comes from, and what it sends."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from afd.cli.main import main
from afd.gateway import chat_client


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the conversation is begun with."""
    seen: dict[str, object] = {}

    def run_chat(url: str, model: str, system: str, **options: object) -> int:
        seen.update(options, url=url, model=model, system=system)
        return 0

    monkeypatch.setattr(chat_client, "run_chat", run_chat)
    monkeypatch.delenv("AFD_API_KEY", raising=False)
    return seen


def test_nothing_is_sent_that_was_not_given(sent: dict[str, object]) -> None:
    assert main(["chat", "--url", "http://h"]) == 0
    assert sent == {"url": "http://h", "model": "", "system": "", "api_key": "", "sampling": {}}


def test_flags(sent: dict[str, object]) -> None:
    flags = ["--temperature", "0", "--top-p", "0.9", "--max-tokens", "5", "--system", "be brief", "--api-key", "k"]
    assert main(["chat", "--url", "http://h", *flags]) == 0
    assert sent["sampling"] == {"temperature": 0.0, "top_p": 0.9, "max_tokens": 5}
    assert (sent["system"], sent["api_key"]) == ("be brief", "k")


def test_the_key_comes_from_a_file_or_the_environment(
    sent: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("\n# mine\n  first  \nsecond\n")
    monkeypatch.setenv("AFD_API_KEY", "of-the-environment\n")
    assert main(["chat", "--url", "http://h"]) == 0 and sent["api_key"] == "of-the-environment"
    assert main(["chat", "--url", "http://h", "--api-key-file", str(file)]) == 0 and sent["api_key"] == "first"


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe"])
def test_files_without_a_key(
    content: bytes | None, sent: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    assert main(["chat", "--url", "http://h", "--api-key-file", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"afd: error: --api-key-file {file}") and not sent


def test_lines_are_edited_on_a_terminal() -> None:
    """Up brings back the last line, and Backspace takes a letter away."""
    code = (
        "from afd.gateway import chat_client\nfrom afd.cli.main import main\n"
        "chat_client.run_chat = lambda *a, **k: print([input('> '), input('> ')]) or 0\n"
        "main(['chat', '--url', 'http://h'])"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        for typed in (b"hellp\x7fo\r", b"\x1b[A!\r"):
            while not shown.endswith(b"> "):
                shown += os.read(ours, 1024)
            os.write(ours, typed)
            shown = b""
        while b"]" not in shown:
            shown += os.read(ours, 1024)
        process.wait(30)
    os.close(ours)
    assert b"['hello', 'hello!']" in shown

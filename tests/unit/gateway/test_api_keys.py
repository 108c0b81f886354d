"""The file of API keys: what is read, and what is said about keys and modes that are too weak."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd.errors import ConfigError
from afd.gateway.api_keys import load_api_keys

LONG = "0123456789abcdef"


def test_a_good_file_is_taken_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{LONG}\n\n  {LONG}2  \n")
    path.chmod(0o640)  # as Kubernetes mounts it
    keys = load_api_keys(str(path))
    assert keys.accepts(f"Bearer {LONG}".encode()) and keys.accepts(f"bearer {LONG}2".encode())
    assert not keys.accepts(b"Bearer # ours") and not keys.accepts(LONG.encode())
    assert not caplog.records


@pytest.mark.parametrize(
    ("mode", "keys", "words"),
    [
        (0o644, LONG, "can be read by others"),
        (0o606, LONG, "can be changed by others"),
        (0o620, LONG, "can be changed by others"),
        (0o600, f"{LONG}\nsecret\nx", "2 of 3 keys have fewer than 16 characters"),
    ],
)
def test_weak_ones_are_named_without_the_key(
    mode: int, keys: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(keys)
    path.chmod(mode)
    assert load_api_keys(str(path)).required
    (record,) = caplog.records
    assert words in record.getMessage() and str(path) in record.getMessage()
    assert not any(key in record.getMessage() for key in ("secret", LONG))


def test_a_file_as_windows_editors_write_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"\ufeff{LONG}\r\n{LONG}2\r\n".encode())
    keys = load_api_keys(str(path))
    assert keys.accepts(f"Bearer {LONG}".encode()) and keys.accepts(f"Bearer {LONG}2".encode())


def test_no_file_and_no_keys(tmp_path: Path) -> None:
    assert not load_api_keys("").required
    for content in (None, b"", b"# nothing\n", b"\xff\xfe"):
        path = tmp_path / "keys"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=str(path)):
            load_api_keys(str(path))

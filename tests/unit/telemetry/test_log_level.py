"""A log level that changes in the configuration file reaches the process that runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from afd.config import resolve_config
from afd.telemetry.log_level import LogLevelWatch

NEVER_S = 3600.0  # the thread sleeps; the test looks itself


@pytest.fixture(autouse=True)
def level_stays() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


def watch(path: Path) -> LogLevelWatch:
    return LogLevelWatch(str(path), lambda: resolve_config(str(path), {}).log.level, every_s=NEVER_S)


def test_a_changed_level_is_taken_and_a_flag_holds_until_then(tmp_path: Path) -> None:
    path = tmp_path / "afd.toml"
    path.write_text('[log]\nlevel = "info"\n')
    logging.getLogger().setLevel(logging.ERROR)  # as --log-level error gave it
    with closing(watch(path)) as watched:
        watched.look()
        assert logging.getLogger().level == logging.ERROR
        path.write_text('[log]\nlevel = "info"\n\n[sla]\ntpot_ms = 20\n')
        watched.look()
        assert logging.getLogger().level == logging.ERROR
        path.write_text('[log]\nlevel = "debug"\n')
        watched.look()
        assert logging.getLogger().level == logging.DEBUG
        assert logging.getLogger("httpx").level == logging.WARNING


def test_a_mounted_file_is_followed_through_its_links(tmp_path: Path) -> None:
    """Kubernetes: afd.toml -> ..data/afd.toml, and ..data is swapped."""
    for number, level in enumerate(("info", "debug")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "afd.toml").write_text(f'[log]\nlevel = "{level}"\n')
    (tmp_path / "..data").symlink_to("0")
    (tmp_path / "afd.toml").symlink_to("..data/afd.toml")
    with closing(watch(tmp_path / "afd.toml")) as watched:
        (tmp_path / "next").symlink_to("1")
        os.replace(tmp_path / "next", tmp_path / "..data")
        watched.look()
        assert logging.getLogger().level == logging.DEBUG


@pytest.mark.parametrize("text", ['[log]\nlevel = "loud"\n', "[log", None], ids=["unknown", "cut off", "gone"])
def test_a_file_that_is_wrong_changes_nothing(
    text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "afd.toml"
    path.write_text('[log]\nlevel = "info"\n')
    logging.getLogger().setLevel(logging.INFO)
    with closing(watch(path)) as watched:
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        watched.look()
        watched.look()
        assert logging.getLogger().level == logging.INFO
    assert len([one for one in caplog.messages if "the log level stays at info" in one]) == 1

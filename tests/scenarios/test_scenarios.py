"""Scenarios that can be read as text: what comes in, and what comes of it. See `tests/scenarios/script.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.script import blocks_of, check, rewrite, run
from tests.scenarios.worker_world import WorkerWorld
from tests.scenarios.worlds import scenarios, world_of


@pytest.mark.parametrize("path", scenarios(), ids=lambda path: f"{path.parent.name}-{path.stem.replace('_', '-')}")
def test_a_scenario_comes_out_as_it_is_written(path: Path) -> None:
    check(path, world_of(path))


SUBMITTED = "lease\nsubmit a\nbegin\n----\n"


@pytest.mark.parametrize(
    "expected", ["", "stream 0 computes nothing\n", "stream 0 computes 3 of its prompt of a\nmore\n"]
)
def test_a_block_that_comes_out_differently_fails(tmp_path: Path, expected: str) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(f"# No command.\n\n{SUBMITTED}{expected}")
    with pytest.raises(AssertionError, match=r"wrong\.txt:3: lease / submit a / begin"):
        check(path, WorkerWorld())


def test_what_comes_is_written_in_place_of_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(f"# A story.\n{SUBMITTED}nothing\n\n\ncommit\n")
    assert rewrite(path, WorkerWorld())
    written = path.read_text()
    assert written.startswith(f"# A story.\n{SUBMITTED}stream 0 computes ")
    check(path, WorkerWorld())
    assert not rewrite(path, WorkerWorld())
    assert path.read_text() == written


def test_every_scenario_expects_something() -> None:
    assert scenarios()
    assert [path for path in scenarios() if not any(block.expected for block in blocks_of(path.read_text()))] == []


@pytest.mark.parametrize("name", ["sumbit a", "news", "_lines"])
def test_an_unknown_command_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"line 1: no command '{name.split()[0]}'"):
        run(blocks_of(name)[0], WorkerWorld())

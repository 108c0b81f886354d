"""Scenarios as text: commands, a line of dashes, what came of them. Blocks are separated by empty lines.

A line that begins with # is a comment. A command is the name of a method of the scenario's world, then words and
KEY=VALUE; the world's class documents each. Below the dashes stands all that could be seen from outside while the
block's commands ran, no more and no less. After an intended change `python -m tests.scenarios` writes it anew.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

DASHES = "----"


class World(Protocol):
    """What a scenario happens in. Its public methods but `news` are the commands."""

    def news(self) -> list[str]:
        """What could be seen from outside since the last call, a line each."""


@dataclass(slots=True)
class Block:
    """Commands that belong together, and what comes of them."""

    line: int
    """Number of its first line in the file."""
    head: list[str] = field(default_factory=list)
    """Comments and commands as they stand there."""
    expected: list[str] = field(default_factory=list)

    def text(self, came: list[str]) -> str:
        """The block as it stands in a file where this came of it."""
        return "\n".join([*self.head, *([DASHES, *came] if came else [])])


def blocks_of(text: str) -> list[Block]:
    """The blocks of a scenario."""
    blocks: list[Block] = []
    block, lines = None, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            block = None
            continue
        if block is None:
            block = Block(number)
            blocks.append(block)
            lines = block.head
        if line == DASHES:
            lines = block.expected
        else:
            lines.append(line)
    return blocks


def run(block: Block, world: World) -> list[str]:
    """Run a block's commands -> what came of them."""
    for line in block.head:
        if line.startswith("#"):
            continue
        name, *words = shlex.split(line)
        command = None if name in ("news", "") or name.startswith("_") else getattr(world, name.replace("-", "_"), None)
        if command is None:
            raise ValueError(f"line {block.line}: no command {name!r}")
        named = dict(word.split("=", 1) for word in words if "=" in word)
        command(*(word for word in words if "=" not in word), **named)
    return world.news()


def played(path: Path, world: World) -> Iterator[tuple[Block, list[str]]]:
    """Each block of a scenario, and what came of it."""
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    if not blocks:
        raise ValueError(f"{path} is empty")
    for block in blocks:
        yield block, run(block, world)


def check(path: Path, world: World) -> None:
    """Play a scenario to its end; every block must come out as it says."""
    for block, came in played(path, world):
        assert came == block.expected, f"{path.name}:{block.line}: {' / '.join(block.head)}"


def rewrite(path: Path, world: World) -> bool:
    """Write what comes of a scenario in place of what was expected -> whether that changed it."""
    before = path.read_text(encoding="utf-8")
    after = "\n\n".join(block.text(came) for block, came in played(path, world)) + "\n"
    path.write_text(after, encoding="utf-8")
    return after != before

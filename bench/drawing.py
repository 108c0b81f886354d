"""How a bench's tokens are drawn. Standard library only: peers' environments read it, too."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drawing:
    """temperature 0 = greedy: the largest logit."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def __str__(self) -> str:
        return "greedy" if self.greedy else f"temperature {self.temperature:g}, top_p {self.top_p:g}"


GREEDY = Drawing()


def add_flags(parser: ArgumentParser) -> None:
    """--temperature and --top-p, the fields of a `Drawing`."""
    parser.add_argument("--temperature", type=float, default=0.0, help="of every request; default: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)

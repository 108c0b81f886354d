"""What a peer is: an engine that lives in a virtual environment of its own.

This folder is read on both sides: by the driver (names, recipes, files) and by `bench/compare/worker.py`, which runs
with the peer's interpreter. So nothing here imports more than the standard library before `start`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from bench.drawing import Drawing


@dataclass(frozen=True, slots=True)
class Setup:
    """model: a folder or file as the peer's `files` says.  max_length: prompt and output tokens of one sequence."""

    model: str
    dtype: str
    threads: int
    max_sequences: int
    max_length: int


class Peer(ABC):
    """One engine. Its module's docstring says how to make its environment."""

    name: ClassVar[str]
    files: ClassVar[Literal["huggingface", "gguf"]]
    draws: ClassVar[bool] = True
    """False for one that is only asked for greedy tokens."""
    environment: ClassVar[Mapping[str, str]] = {}
    """Variables its process starts with."""

    @abstractmethod
    def start(self, setup: Setup) -> str:
        """Loads the model and returns the engine's version. Called once, before everything else."""

    @abstractmethod
    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing) -> list[list[int]]:
        """`output_len` tokens for each prompt, all submitted at once; nothing is kept for the next round."""

    @abstractmethod
    def close(self) -> None:
        """Gives the engine's processes and memory back."""

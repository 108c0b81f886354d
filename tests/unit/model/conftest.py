"""Fixtures of the model tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afd.model.presets import PRESETS
from tests.unit.model.model_files import STEP3_TINY, hf_tensors, write_safetensors


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_cases() -> list[dict[str, Any]]:
    """step3-tiny's greedy tokens and log-probabilities, from another engine."""
    return json.loads((STEP3_TINY / "golden.json").read_text())["cases"]


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(preset, edit_config, edit_tensors) -> a Hugging Face folder with one safetensors file."""

    def make(
        preset: str,
        edit_config: Callable[[dict[str, Any]], None] = lambda config: None,
        edit_tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    ) -> Path:
        config = dict(PRESETS[preset])
        tensors = hf_tensors(config)
        edit_config(config)
        edit_tensors(tensors)
        folder = tmp_path / preset
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return make

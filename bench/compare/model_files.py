"""The default model in the form each peer reads, from one and the same file."""

from __future__ import annotations

from pathlib import Path

import torch

from afd.model.loading import DEFAULT_MODEL, resolve_model
from tests.oracles.hf import load_hf_llama


def gguf_file() -> str:
    """As it is installed: 4-bit weights."""
    return str(resolve_model(DEFAULT_MODEL).path)


def export_huggingface(folder: Path, dtype: str) -> str:
    """A Hugging Face folder of safetensors: the file's weights dequantised to float32 and rounded to `dtype`."""
    model = load_hf_llama(Path(gguf_file()))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)

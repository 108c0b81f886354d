"""The default model in the form each peer reads, from one and the same file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from afd.model.loading import DEFAULT_MODEL, resolve_model
from tests.oracles.hf import load_hf_llama


def gguf_file() -> str:
    """The installed model file, with 4-bit weights."""
    return str(resolve_model(DEFAULT_MODEL).path)


def huggingface_folder(parent: Path, dtype: str) -> str:
    """Safetensors: the file's weights dequantised to float32 and rounded to `dtype`. Written to `parent` once.

    The path stays the same from run to run, because engines keep what they compile under it.
    """
    folder = parent / f"{DEFAULT_MODEL}-{dtype}"
    if not folder.exists():
        model = load_hf_llama(Path(gguf_file()))
        with tempfile.TemporaryDirectory(dir=parent) as unfinished:
            model.to(getattr(torch, dtype)).save_pretrained(Path(unfinished) / folder.name)
            (Path(unfinished) / folder.name).rename(folder)
    return str(folder)

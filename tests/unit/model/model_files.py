"""Models written as files for tests: seeded weights under Hugging Face names, in plain safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from afd.model.families import family_of_config
from afd.model.families.config_reader import ConfigReader
from afd.model.inventory import inventory
from afd.model.weights.dummy import DummySource, dummy_name

STEP3_TINY = Path(__file__).parents[2] / "fixtures" / "step3-tiny"


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A float32 safetensors file, by the format's definition."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    raw = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(array, np.float32).tobytes() for array in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def hf_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Seeded weights of a config under the family's Hugging Face names."""
    reader = ConfigReader(config, "test config")
    family = family_of_config(reader)
    tensors = inventory(family.parse(reader, "test"))
    source = DummySource(tensors, seed=3)
    stored: dict[str, np.ndarray] = {}
    for tensor in tensors:
        array = np.asarray(source.read(dummy_name(tensor)).array)
        if family.naming.is_per_expert(tensor.part):
            stored |= {family.naming.stored_name(tensor, e): array[e] for e in range(len(array))}
        else:
            stored[family.naming.stored_name(tensor)] = array
    return stored

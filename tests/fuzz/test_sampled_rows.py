"""Sampled rows: native kernels and reference give the same tokens, whatever the logits and parameters."""

from __future__ import annotations

import pytest

from afd.ops.cpu.binding import KernelsUnavailableError, NativeKernels, available_isas, load_library
from tests.fuzz.campaign import generator, volume
from tests.unit.ops.sample_batches import check_batches


def test_every_instruction_set_draws_the_references_tokens() -> None:
    try:
        library = load_library()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    num_rows = volume(100_000, 200)
    for isa in available_isas(library):
        check_batches(NativeKernels(library, isa), generator(f"sampled rows {isa}", num_rows).getrandbits(32), num_rows)

"""The functions of `afd.ops`: choice of implementation, checks, threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import afd.ops as face
from afd.ops import PackedMatrix
from afd.ops.cpu.binding import ISAS, KernelsUnavailableError, NativeKernels, available_isas, load_library
from tests.unit.ops.paged_batches import BatchShape, make_batch

ROOT = Path(face.__file__).parents[2]


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """The choice of kernels, made once a process, is made again in the test and after it."""
    face._kernels.cache_clear()
    yield
    face._kernels.cache_clear()


def test_the_best_instruction_set_is_chosen(library: ctypes.CDLL) -> None:
    assert face.select_kernels().name == available_isas(library)[-1]
    assert available_isas(library)[0] == "portable"
    for isa in available_isas(library):
        assert face.select_kernels(isa).name == isa
    assert face.select_kernels("reference").name == "reference"


def test_what_cannot_run_is_refused_by_name(library: ctypes.CDLL) -> None:
    with pytest.raises(KernelsUnavailableError, match="sse9"):
        face.select_kernels("sse9")
    for isa in set(ISAS) - set(available_isas(library)):
        with pytest.raises(KernelsUnavailableError, match=isa):
            face.select_kernels(isa)


@pytest.mark.usefixtures("library", "chosen_anew")
def test_the_environment_forces_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_KERNELS_ISA", "portable")
    assert face.active_isa() == "portable"
    face._kernels.cache_clear()
    monkeypatch.setenv("AFD_KERNELS_ISA", "sse9")
    with pytest.raises(KernelsUnavailableError, match="sse9"):
        face.active_isa()


@pytest.mark.usefixtures("chosen_anew")
def test_without_the_library_one_warning_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ctypes.CDLL:
        raise KernelsUnavailableError("not built")

    monkeypatch.delenv("AFD_KERNELS_ISA", raising=False)
    monkeypatch.setattr(face, "load_library", missing)
    x = torch.ones(2, 8)
    with pytest.warns(RuntimeWarning, match="native kernels are not in use.*not built"):
        assert face.rms_norm(x, torch.ones(8), 0.0).eq(1.0).all()
    assert face.rms_norm(x, torch.ones(8), 0.0).eq(1.0).all()
    assert face.active_isa() == "reference"
    face.close()


def test_a_missing_broken_or_foreign_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="build_ext --inplace"):
        load_library(tmp_path / "_native.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(KernelsUnavailableError, match="cannot be loaded"):
        load_library(broken)


def test_workers_start_when_wanted_and_end_when_told(library: ctypes.CDLL) -> None:
    kernels = NativeKernels(library, "portable")
    kernels.close()
    batch = make_batch(BatchShape(((2000, 1),)))
    batch.run(kernels)
    assert kernels.num_workers() == 0
    before = len(os.listdir("/proc/self/task"))
    for num_threads in (2, 3, 2):
        batch.run(kernels, num_threads)
    assert kernels.num_workers() == 2
    kernels.close()
    assert kernels.num_workers() == 0
    assert len(os.listdir("/proc/self/task")) == before
    batch.run(kernels, 2)
    assert kernels.num_workers() == 1
    kernels.close()


def test_little_work_wakes_nobody(library: ctypes.CDLL) -> None:
    kernels = NativeKernels(library, "portable")
    kernels.close()
    make_batch(BatchShape(((100, 1), (20, 2)))).run(kernels, 4)
    x, w = torch.ones(4, 64, dtype=torch.bfloat16), PackedMatrix(torch.ones(512, 64, dtype=torch.bfloat16))
    kernels.gemm(x, w, torch.empty(4, 512), 4)
    assert kernels.num_workers() == 0


def test_fork_and_exit_with_workers_up(library: ctypes.CDLL) -> None:
    """A forked child has workers of its own, and neither process hangs on its way out."""
    code = (
        "import os, sys, torch, afd.ops as k\n"
        "x = torch.ones(4, 512, dtype=torch.bfloat16); w = k.PackedMatrix(torch.ones(4096, 512).bfloat16())\n"
        "k.gemm(x, w, num_threads=3)\n"
        "pid = os.fork()\n"
        "total = float(k.gemm(x, w, num_threads=2).sum())\n"
        "workers = k.select_kernels().num_workers()\n"
        "if pid == 0: sys.exit(0 if (total, workers) == (512.0 * 4 * 4096, 1) else 1)\n"
        "print(total, workers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.split()) == (0, [str(512.0 * 4 * 4096), "2", "0"]), ran.stderr


def test_functions_allocate_their_result() -> None:
    batch = make_batch(BatchShape(((20, 2),), dtype=torch.bfloat16))
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.seq_lens, batch.query_start)
    out = face.paged_attention(*arguments, batch.scale)
    assert out.shape == (2, 6, 64) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), batch.expected()[0], rtol=2**-6, atol=2**-6)
    x = torch.ones(3, 16)
    assert face.rms_norm(x, torch.full((16,), 2.0), 0.0).eq(2.0).all()
    assert face.add_rms_norm(x, [torch.ones(3, 16)], torch.ones(16), 0.0).eq(1.0).all() and x.eq(2.0).all()
    assert face.silu_mul(torch.zeros(3, 16)).shape == (3, 8)


class TestArgumentChecks:
    """What the native code trusts is refused when it does not hold."""

    def attention(self, **changes: object) -> None:
        batch = make_batch(BatchShape(((20, 2),)))
        arguments = {
            "q": batch.q,
            "k_cache": batch.k_cache,
            "v_cache": batch.v_cache,
            "block_table": batch.block_table,
            "seq_lens": batch.seq_lens,
            "query_start": batch.query_start,
            "scale": 1.0,
        }
        face.paged_attention(**{**arguments, **changes})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "changes",
        [
            {"q": torch.zeros(2, 6, 64, dtype=torch.bfloat16)},
            {"q": torch.zeros(2, 6, 64, dtype=torch.float16)},
            {"q": torch.zeros(2, 6, 32)},
            {"q": torch.zeros(2, 5, 64)},
            {"q": torch.zeros(2, 384)},
            {"q": torch.zeros(2, 64, 6).transpose(1, 2)},
            {"k_cache": torch.zeros(4, 2, 16, 64).transpose(1, 2)},
            {"k_cache": torch.zeros(5, 2, 16, 64)},
            {"k_cache": torch.zeros(4, 2, 12, 64), "v_cache": torch.zeros(4, 2, 12, 64)},
            {"k_cache": torch.zeros(4, 2, 16, 520), "q": torch.zeros(2, 6, 520)},
            {"block_table": torch.zeros(1, 3, dtype=torch.int64)},
            {"block_table": torch.zeros(2, 3, dtype=torch.int32)},
            {"seq_lens": torch.zeros(1, dtype=torch.int64)},
            {"query_start": torch.zeros(1, dtype=torch.int32)},
            {"window": -1},
            {"num_threads": 0},
            {"out": torch.zeros(2, 6, 32)},
            {"out": torch.zeros(2, 6, 64, dtype=torch.bfloat16)},
        ],
    )
    def test_attention(self, changes: dict[str, object]) -> None:
        self.attention()
        with pytest.raises(ValueError):
            self.attention(**changes)

    def test_rows(self) -> None:
        x, weight = torch.zeros(3, 16), torch.ones(16)
        refused = [
            lambda: face.rms_norm(x, weight.double(), 0.0),
            lambda: face.rms_norm(x, torch.ones(8), 0.0),
            lambda: face.rms_norm(x.T, torch.ones(3), 0.0),
            lambda: face.add_rms_norm(x, [torch.zeros(2, 16)], weight, 0.0),
            lambda: face.add_rms_norm(x, [torch.zeros(3, 16), torch.zeros(3, 16).bfloat16()], weight, 0.0),
            lambda: face.add_rms_norm(x, [x] * 17, weight, 0.0),
            lambda: face.add_rms_norm(x, [], weight, 0.0, torch.zeros(3, 16).double()),
            lambda: face.silu_mul(torch.zeros(3, 15)),
            lambda: face.silu_mul(torch.zeros(3, 16), 0.0, torch.zeros(3, 16)),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

    def test_gemm(self) -> None:
        x, plain = torch.zeros(4, 16).bfloat16(), torch.zeros(5, 16).bfloat16()
        w = face.PackedMatrix(plain)
        refused = [
            lambda: face.gemm(x.float(), w),
            lambda: face.gemm(x[:, :8], w),
            lambda: face.gemm(x, w, torch.zeros(4, 6)),
            lambda: face.gemm(x, w, num_threads=0),
            lambda: face.pack(plain.float()),
            lambda: face.pack(plain[:, :8]),
            lambda: face.pack(plain[:, :15].contiguous()),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

    def test_rope_and_kv(self) -> None:
        q, k, cache = torch.zeros(3, 4, 32), torch.zeros(3, 2, 32), torch.zeros(2, 2, 8, 32)
        cos, slots = torch.ones(3, 16), torch.arange(3)
        face.rope_write_kv(q, k, k, cos, cos, cache, cache.clone(), slots)
        refused = [
            lambda: face.rope_write_kv(q, k, k, cos[:2], cos[:2], cache, cache, slots),
            lambda: face.rope_write_kv(q, k, k, torch.ones(3, 17), torch.ones(3, 17), cache, cache, slots),
            lambda: face.rope_write_kv(q, k, k, cos, cos.double(), cache, cache, slots),
            lambda: face.rope_write_kv(q[:2], k, k, cos, cos, cache, cache, slots),
            lambda: face.write_kv(k, k, cache, cache, slots.int()),
            lambda: face.write_kv(k, k[:, :1], cache, cache, slots),
            lambda: face.write_kv(k.bfloat16(), k, cache, cache, slots),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

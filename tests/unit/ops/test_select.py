"""The choice of ops, their checks, and the native threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import afd
from afd.errors import ModelError
from afd.ops import select as select_module
from afd.ops.cpu.abi import ISAS
from afd.ops.cpu.binding import KernelsUnavailableError, NativeKernels, available_isas, load_library
from afd.ops.cpu.ops import CpuOps
from afd.ops.cpu.packed import PackedMatrix
from afd.ops.ops import KvWrite, Rotation
from afd.ops.select import native_kernels, select
from tests.unit.ops.paged_batches import BatchShape, make_batch

ROOT = Path(afd.__file__).parents[1]


def test_the_best_instruction_set_is_chosen(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFD_KERNELS_ISA", raising=False)
    assert select("cpu", "float32").name == available_isas(library)[-1]
    assert available_isas(library)[0] == "portable"
    for isa in available_isas(library):
        assert select("cpu", "float32", isa).name == native_kernels(isa).name == isa
    assert select("cpu", "float32", "reference").name == "reference"


def test_what_cannot_run_is_refused_by_name(library: ctypes.CDLL) -> None:
    with pytest.raises(KernelsUnavailableError, match="sse9"):
        select("cpu", "float32", "sse9")
    for isa in set(ISAS) - set(available_isas(library)):
        with pytest.raises(KernelsUnavailableError, match=isa):
            select("cpu", "float32", isa)


def test_dtype_and_device_are_those_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert select("cpu", dtype).dtype is select("cpu", str(dtype).removeprefix("torch.")).dtype is dtype
    assert select("cpu", "float32").device == torch.device("cpu")
    for wrong in ("float16", torch.float64):
        with pytest.raises(ModelError, match=r"compute dtype .* is not supported \(known: float32, bfloat16\)"):
            select("cpu", wrong)


@pytest.mark.usefixtures("library")
def test_the_environment_forces_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_KERNELS_ISA", "portable")
    assert select("cpu", "float32").name == "portable"
    monkeypatch.setenv("AFD_KERNELS_ISA", "sse9")
    with pytest.raises(KernelsUnavailableError, match="sse9"):
        select("cpu", "float32")


def test_without_the_library_a_warning_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ctypes.CDLL:
        raise KernelsUnavailableError("not built")

    monkeypatch.delenv("AFD_KERNELS_ISA", raising=False)
    monkeypatch.setattr(select_module, "load_library", missing)
    with pytest.warns(RuntimeWarning, match="native kernels are not in use.*not built"):
        ops = select("cpu", "float32")
    assert ops.norm(torch.ones(2, 8), torch.ones(8), 0.0).eq(1.0).all()
    assert ops.name == "reference"
    ops.close()


def test_a_missing_or_broken_library_says_what_to_do(tmp_path: Path) -> None:
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
        "import os, sys, torch\n"
        "from afd.ops.cpu.packed import PackedMatrix\n"
        "from afd.ops.select import native_kernels\n"
        "kernels = native_kernels()\n"
        "x, w = torch.ones(4, 512, dtype=torch.bfloat16), PackedMatrix(torch.ones(4096, 512).bfloat16())\n"
        "out = torch.empty(4, 4096)\n"
        "kernels.gemm(x, w, out, 3)\n"
        "pid = os.fork()\n"
        "kernels.gemm(x, w, out.zero_(), 2)\n"
        "total, workers = float(out.sum()), kernels.num_workers()\n"
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


class TestArgumentChecks:
    """What the native code trusts is refused when it does not hold."""

    @pytest.fixture
    def ops(self, kernels: NativeKernels) -> CpuOps:
        return CpuOps(kernels, torch.float32)

    @pytest.mark.parametrize(
        "changes",
        [
            {"q": torch.zeros(2, 6, 64, dtype=torch.bfloat16)},
            {"q": torch.zeros(2, 6, 64, dtype=torch.float16)},
            {"q": torch.zeros(2, 6, 32)},
            {"q": torch.zeros(2, 5, 64)},
            {"q": torch.zeros(2, 384)},
            {"q": torch.zeros(2, 64, 6).transpose(1, 2)},
            {"k_cache": torch.zeros(4, 2, 64, 16).transpose(2, 3)},
            {"k_cache": torch.zeros(5, 2, 16, 64)},
            {"block_table": torch.zeros(1, 3, dtype=torch.int64)},
            {"block_table": torch.zeros(2, 3, dtype=torch.int32)},
            {"seq_lens": torch.zeros(1, dtype=torch.int64)},
            {"query_start": torch.zeros(1, dtype=torch.int32)},
            {"window": -1},
        ],
    )
    def test_attention(self, ops: CpuOps, changes: dict[str, Any]) -> None:
        args = make_batch(BatchShape(((20, 2),))).args()
        ops.paged_attention(args)
        with pytest.raises(ValueError):
            ops.paged_attention(args._replace(**changes))

    def test_attention_of_other_caches_is_torchs(self, ops: CpuOps) -> None:
        """Blocks or heads that the kernels do not take."""
        for shape in (BatchShape(((20, 2),), block_size=12), BatchShape(((20, 2),), head_dim=520, v_dim=520)):
            batch = make_batch(shape)
            batch.k_cache.nan_to_num_(0.0)
            batch.v_cache.nan_to_num_(0.0)
            torch.testing.assert_close(ops.paged_attention(batch.args()), batch.expected()[0], rtol=1e-5, atol=1e-5)

    def test_rows(self, ops: CpuOps) -> None:
        x, weight = torch.zeros(3, 16), torch.ones(16)
        refused = [
            lambda: ops.norm(x, weight.double(), 0.0),
            lambda: ops.norm(x, torch.ones(8), 0.0),
            lambda: ops.norm(x.T, torch.ones(3), 0.0),
            lambda: ops.norm(x.double(), weight, 0.0),
            lambda: ops.silu_mul(torch.zeros(3, 15), 0.0),
            lambda: ops.silu_mul(torch.zeros(3, 16).double(), 0.0),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

    def test_gemm(self, ops: CpuOps) -> None:
        x, w = torch.zeros(4, 16).bfloat16(), PackedMatrix(torch.zeros(5, 16).bfloat16())
        refused = [
            lambda: ops.linear(x.float(), w),
            lambda: ops.linear(x[:, :8], w),
            lambda: ops.head_logits(x, w, torch.zeros(3, 5), 0, 5),
            lambda: ops.head_logits(x, w, torch.zeros(4, 5), 1, 5),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

    def test_a_matrix_that_cannot_be_packed_stays(self, kernels: NativeKernels) -> None:
        ops = CpuOps(kernels, torch.bfloat16)
        plain = torch.zeros(5, 16).bfloat16()
        assert isinstance(ops.prepare(plain), PackedMatrix) == kernels.vectorised
        for w in (plain.float(), plain[:, :8], plain[:, :15].contiguous(), plain[None]):
            assert ops.prepare(w) is w

    def test_rope_and_kv(self, ops: CpuOps) -> None:
        q, k, cache = torch.zeros(3, 4, 32), torch.zeros(3, 2, 32), torch.zeros(2, 2, 8, 32)
        cos, slots = torch.ones(3, 16), torch.arange(3)
        write, rotation = KvWrite(k, k, cache, cache.clone(), slots), Rotation(cos, cos)
        ops.rope_write_kv(q, write, rotation)
        refused = [
            lambda: ops.rope_write_kv(q, write, Rotation(cos[:2], cos[:2])),
            lambda: ops.rope_write_kv(q, write, Rotation(torch.ones(3, 17), torch.ones(3, 17))),
            lambda: ops.rope_write_kv(q, write, Rotation(cos, cos.double())),
            lambda: ops.rope_write_kv(q[:2], write, rotation),
            lambda: ops.rope_write_kv(q, write._replace(slot_mapping=slots.int()), rotation),
            lambda: ops.rope_write_kv(q, write._replace(v=k[:, :1]), rotation),
            lambda: ops.rope_write_kv(q, write._replace(k=k.bfloat16()), rotation),
        ]
        for call in refused:
            with pytest.raises(ValueError):
                call()

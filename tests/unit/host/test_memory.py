"""Memory of weights and KV: tensors side by side in large pieces that the kernel may back with huge pages."""

import gc
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from afd.host import memory as memory_module
from afd.host.memory import ALIGNMENT, PIECE_BYTES, HostMemory, limit_bytes, zeroed


def mapping_of(address: int) -> str | None:
    """The paragraph of /proc/self/smaps that holds an address; None = it is not mapped."""
    for paragraph in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(edge, 16) for edge in paragraph.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return paragraph
    return None


def test_tensors_lie_apart_side_by_side_and_hold_what_is_written():
    memory = HostMemory()
    shapes = [(3, 5), (0, 7), (2, 3, 4), (1,), (64, 64)]
    tensors = [memory.empty(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tensor.is_contiguous() and (tensor == number).all()
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    assert addresses == sorted(addresses) and addresses[-1] - addresses[0] < PIECE_BYTES


def test_what_is_larger_than_a_piece_gets_one_of_its_own():
    memory = HostMemory()
    memory.empty((16,), torch.int8)
    large = memory.empty((PIECE_BYTES + 1,), torch.int8)
    large[-1] = 7
    assert large[-1] == 7 and not large[:-1].any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, madvise")
def test_pieces_ask_for_huge_pages_and_go_with_their_last_tensor():
    memory = HostMemory()
    first, second = memory.empty((4096, 4096), torch.int8), memory.empty((4096, 4096), torch.int8)
    first.fill_(1)
    address = second.data_ptr()
    mapping = mapping_of(address)
    assert mapping is not None
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert re.search(r"VmFlags:.* hg", mapping), mapping
    del memory, first
    gc.collect()
    second.fill_(2)
    assert mapping_of(address) is not None
    del second
    gc.collect()
    left = mapping_of(address)
    assert left is None or "hg" not in left.rsplit("VmFlags:", 1)[1].split()


def test_nothing_is_nothing():
    assert zeroed(0).shape == (0,) and HostMemory().empty((0, 3), torch.bfloat16).shape == (0, 3)


def test_the_limit_is_the_machines_memory_or_the_containers(tmp_path, monkeypatch):
    limit, unlimited, absent = tmp_path / "limit", tmp_path / "unlimited", tmp_path / "absent"
    limit.write_text("1073741824\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(memory_module, "CGROUP_LIMITS", (str(unlimited), str(absent)))
    machine = limit_bytes()
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory_module, "CGROUP_LIMITS", (str(unlimited), str(limit)))
    assert limit_bytes() == min(machine, 1 << 30)

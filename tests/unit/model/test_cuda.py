"""The GPU's side of a worker over a twin of CUDA, and that the twin catches what CUDA would get wrong."""

from __future__ import annotations

import pytest
import torch

from afd.errors import ConfigError, DeviceError
from afd.model import cuda as cuda_module
from afd.model.batch import AttentionBatch
from afd.model.cuda import CudaDevice
from afd.ops.device import to_device
from afd.ops.select import check_device, select
from afd.ops.torch_ops import attend_decodes, attend_in_turn
from tests.fakes import cuda


@pytest.fixture
def gpu(monkeypatch):
    cuda.install(monkeypatch)
    with cuda.FakeCuda().entered() as gpu:
        yield gpu


@pytest.fixture
def device(gpu):
    return CudaDevice()


def test_a_download_is_garbage_until_it_is_done_and_nobody_waits(device, gpu):
    with device.stage(0):
        rows = to_device(torch.arange(6.0).view(2, 3), device.torch_device) * 2
        ids = to_device(torch.tensor([7, 8], dtype=torch.int32), device.torch_device)
        download = device.download((rows, ids))
    host_rows, host_ids = download.tensors
    assert host_rows.isnan().all() and host_ids.tolist() == [-1, -1]
    looks = [download.done() for _ in range(gpu.looks)]
    assert looks == [False] * (gpu.looks - 1) + [True]
    assert host_rows.tolist() == [[0, 2, 4], [6, 8, 10]] and host_ids.tolist() == [7, 8]
    assert download.device_s > 0 and gpu.num_waits == 0
    device.close()
    device.close()


def test_streams_finish_independently(device):
    downloads = []
    for stream in (0, 1):
        with device.stage(stream):
            value = to_device(torch.tensor([float(stream)]), device.torch_device)
            downloads.append(device.download((value,)))
    while not downloads[1].done():
        pass
    assert downloads[1].tensors[0].item() == 1.0 and downloads[0].tensors[0].isnan().all()
    device.synchronize()
    assert downloads[0].tensors[0].item() == 0.0


def test_a_gpu_that_never_ends_is_an_error_after_the_deadline(device, gpu, monkeypatch):
    gpu.looks = 1 << 30
    monkeypatch.setattr(cuda_module, "DEADLINE_S", 0.0)
    with device.stage(0):
        download = device.download(())
    with pytest.raises(DeviceError, match="not finished a stage within 0 s"):
        download.done()


def test_the_ops_of_a_gpu_name_it_as_its_tensors_do(device):
    ops = select("cuda", "bfloat16")
    assert ops.name == "torch" and ops.device == device.torch_device
    assert ops.weight_memory().empty((2, 3), torch.bfloat16).device == ops.device


def test_host_tensors_on_the_host_stay_where_they_are():
    tensor = torch.ones(2)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_without_a_gpu_the_choice_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"ffn.device = 'cuda', but this torch build has no CUDA support"):
        check_device("cuda", "ffn.device")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ConfigError, match="torch finds no usable GPU"):
        check_device("cuda", "ffn.device")
    check_device("cpu", "ffn.device")


def test_the_twin_raises_where_cuda_would_wait_or_be_wrong(device):
    def on_gpu(values):
        return to_device(torch.tensor(values), device.torch_device)

    with device.stage(0):
        x = on_gpu([1.0, 2.0])
    misuses = {
        "numpy of a GPU tensor": lambda: x.numpy(),
        "data_ptr of a GPU tensor": lambda: x.data_ptr(),
        "tolist of a GPU tensor makes the host wait": lambda: x.tolist(),
        "__bool__ of a GPU tensor makes the host wait": lambda: bool((x > 0).all()),
        "add mixes host and GPU tensors": lambda: x + torch.ones(2),
        "__getitem__ mixes": lambda: x[torch.tensor([0])],
        "copy from the GPU that the host would wait for": lambda: torch.empty(2).copy_(x, non_blocking=True),
        "copy to the GPU that the host would wait for": lambda: torch.ones(2).to("cuda", non_blocking=True),
    }
    with device.stage(0):
        for message, misuse in misuses.items():
            with pytest.raises(cuda.GpuMisuseError, match=message):
                misuse()
    with device.stage(1), pytest.raises(cuda.GpuMisuseError, match="another stream has not finished"):
        x + 1
    device.synchronize()
    with device.stage(1):
        assert (x + 1).device == device.torch_device


@pytest.mark.parametrize("gather_tokens", [1, 40, 1 << 17])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("value_width", [16, 8])
def test_decoding_in_large_kernels_equals_one_sequence_at_a_time(gather_tokens, window, value_width):
    generator = torch.Generator().manual_seed(window)
    seqs = [(start, 1, blocks) for start, blocks in ((0, [9]), (7, [3]), (8, [1, 4]), (30, [0, 2, 5, 6]))]
    batch = AttentionBatch.build(seqs, 8)
    q = torch.randn(4, 6, 16, generator=generator)
    k_cache = torch.randn(10, 2, 8, 16, generator=generator)
    v_cache = k_cache[..., :value_width]
    args = batch.attention(q, k_cache, v_cache, 0.25, window)
    torch.testing.assert_close(attend_decodes(args, gather_tokens), attend_in_turn(args))

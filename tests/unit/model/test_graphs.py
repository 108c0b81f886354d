"""Decode graphs: shapes, fixed memory, who makes room. Over the GPU in pure Python; tokens: test_gpu_engines.py."""

import pytest
import torch

from afd.kv.cache import KVCache
from afd.model import graphs
from afd.model.batch import AttentionBatch
from afd.model.cuda import CudaDevice
from afd.model.graphs import MAX_ROWS, DecodeGraphs, rounded
from afd.model.loading import load_attention_half, resolve_model
from afd.ops.select import select
from tests.fakes import cuda

BLOCK, BLOCKS = 8, 32


def test_sizes_are_rounded_up_to_few():
    sizes = sorted({rounded(size) for size in range(1, 257)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(size <= rounded(size) <= max(1.5 * size, size + 1) for size in range(1, 257))


@pytest.fixture
def gpu(monkeypatch):
    cuda.install(monkeypatch)
    with cuda.FakeCuda().entered() as gpu, torch.inference_mode():
        yield gpu


class Layers:
    """All layers of a half, step after step, with graphs and launched; both have a cache of their own."""

    def __init__(self, model: str, num_window_blocks: int | None = None) -> None:
        self.windowed = num_window_blocks is not None
        folder = resolve_model(f"dummy:{model}")
        self.spec = folder.spec
        self.half = load_attention_half(folder, select("cuda", "float32"))
        self.caches = [
            KVCache(self.spec, BLOCKS, BLOCK, self.half.dtype, "cuda", num_window_blocks, spare_block=True)
            for _ in range(2)
        ]
        self.graphs = DecodeGraphs(self.half, self.caches[0], launched_steps=1)
        self.device = CudaDevice()

    def step(self, lengths: list[int], stream: int = 0) -> None:
        """A token for each of sequences of these lengths; raises unless rows and routing are the same."""
        width = BLOCKS // len(lengths)
        items = [(length - 1, 1, range(i * width, (i + 1) * width)) for i, length in enumerate(lengths)]
        with self.device.stage(stream):
            window_blocks = [range(3 * i, 3 * i + 3) for i in range(len(lengths))] if self.windowed else None
            batch = AttentionBatch.build(items, BLOCK, self.half.device, window_blocks)
            tokens = torch.arange(len(lengths)).pin_memory().to("cuda", non_blocking=True)
            x, partials = [self.half.embed(tokens), self.half.embed(tokens)], []
            for layer in range(self.spec.num_layers):
                x[0], captured = self.graphs.layer(stream, layer, x[0], batch, partials)
                launched = self.half.layer(layer, x[1], batch, self.caches[1], partials)
                # A graph's results are overwritten by the next layer, as they are sent before it.
                for one, other in ((captured.rows, launched.rows), (captured.expert_ids, launched.expert_ids)):
                    assert (one is None) == (other is None)
                    if one is not None:
                        torch.testing.assert_close(host(one), host(other))
                partials = [launched.rows * 0.5]
            torch.testing.assert_close(host(x[0]), host(x[1]))


def host(tensor):
    return tensor.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    ("model", "num_window_blocks"),
    [("step3-tiny", None), ("step3.5-flash-tiny", None), ("step3.5-flash-tiny", 15), ("deepseek-v3-tiny", None)],
)
def test_rows_and_routing_are_those_of_launched_layers(gpu, model, num_window_blocks):
    layers = Layers(model, num_window_blocks=num_window_blocks)
    for turn in range(4):
        for lengths in ([9 + turn], [3 + turn, 17, 8], [5, 6, 7, 8, 9 + turn]):
            layers.step(lengths)
    assert gpu.num_captures > 0 and gpu.num_replays > gpu.num_captures


def test_batches_of_one_shape_share_its_graphs_and_rows_beyond_them_harm_nobody(gpu):
    layers = Layers("step3-tiny")
    for lengths in ([9, 9, 9, 9, 9, 9], [10] * 5, [11] * 5, [12] * 6):  # six rows each
        layers.step(lengths)
    assert gpu.num_captures == layers.spec.num_layers
    assert host(layers.caches[0].k[1])[BLOCKS].any(), "the row beyond a batch of five went to the spare block"
    for one, other in zip(*(cache.k + cache.v for cache in layers.caches), strict=True):
        torch.testing.assert_close(host(one)[:BLOCKS], host(other)[:BLOCKS])


def test_streams_have_graphs_of_their_own(gpu):
    layers = Layers("step3-tiny")
    for _ in range(3):
        for stream in (0, 1):
            layers.step([4, 5], stream)
    assert gpu.num_captures == 2 * layers.spec.num_layers


def test_the_shape_that_was_used_least_recently_makes_room(gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 2)
    layers = Layers("step3-tiny")
    for count in (1, 1, 2, 2, 1, 3, 3, 1):  # two makes room for three; one stays
        layers.step([4] * count)
    per_shape = layers.spec.num_layers
    assert gpu.num_captures == 3 * per_shape
    layers.step([4] * 2)
    layers.step([4] * 2)
    assert gpu.num_captures == 4 * per_shape


def test_a_shape_is_captured_when_it_has_come_some_times(gpu):
    layers = Layers("step3-tiny")
    layers.graphs = DecodeGraphs(layers.half, layers.caches[0])
    for _ in range(graphs.LAUNCHED_STEPS):
        layers.step([4])
    assert gpu.num_captures == 0
    layers.step([4])
    assert layers.graphs.num_captured == layers.graphs.num_replayed == layers.spec.num_layers


def test_prompts_and_large_batches_are_launched(gpu):
    layers = Layers("step3-tiny")
    build = lambda items: AttentionBatch.build(items, BLOCK, layers.half.device)  # noqa: E731
    assert layers.graphs.takes(build([(5, 1, [0]), (0, 1, [1])]))
    assert not layers.graphs.takes(build([(0, 2, [0])]))
    assert not layers.graphs.takes(build([(0, 1, [0])] * (MAX_ROWS + 1)))


def test_the_twin_computes_nothing_while_it_captures(gpu):
    stream = gpu.stream
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x += 1
        y = x * 2
    assert host(x).tolist() == [0, 0, 0] and host(y).isnan().all()
    graph.replay()
    graph.replay()
    assert host(x).tolist() == [2, 2, 2] and host(y).tolist() == [4, 4, 4]
    with pytest.raises(cuda.GpuMisuseError, match="within a graph"), torch.cuda.graph(graph, stream=stream):
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)

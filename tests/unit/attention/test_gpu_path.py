"""The GPU's stream loop in one process, its exchange and its clock; over stepmesh: tests/integration."""

from __future__ import annotations

import random
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from afd.attention.build import build
from afd.attention.engine import AttentionEngine
from afd.attention.gateway_link import GatewayLink
from afd.attention.gpu_path import GpuPath
from afd.attention.path import Step
from afd.config import resolve_config
from afd.errors import PeerLostError
from afd.model.cuda import CudaDevice
from afd.model.graphs import DecodeGraphs
from afd.model.halves import Dispatch
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import compare, reference_generate
from afd.model.sharding import ShardSpec
from afd.ops.device import to_device
from afd.ops.select import select
from afd.sched.sequence import Sequence
from afd.types import FfnParallel, SamplingParams
from afd.worker.seat import Seat
from stepmesh.types import WireDtype
from tests.fakes import cuda


@pytest.fixture
def gpu(monkeypatch):
    cuda.install(monkeypatch)
    with cuda.FakeCuda(may_wait=True).entered() as gpu, torch.inference_mode():
        yield gpu


@pytest.fixture(params=[False, True], ids=["launched", "graphs"])
def engine(gpu, request, monkeypatch):
    """That of an attention worker of a mono cluster that has loaded its model onto the GPU."""
    monkeypatch.setattr("afd.attention.build.DecodeGraphs", partial(DecodeGraphs, launched_steps=1))
    torch.set_num_threads(1)
    overrides = {
        "model.name": "dummy:step3-tiny",
        "model.dtype": "float32",
        "cluster.topology": "mono",
        "attention.device": "cuda",
        "attention.cuda_graphs": request.param,
        "attention.streams": 2,
        "attention.num_blocks": 64,
        "attention.block_size": 8,
    }
    config, folder = resolve_config(None, overrides), resolve_model("dummy:step3-tiny")
    seat = Seat(SimpleNamespace(close=lambda: None), "incarnation", "agreed", rank=0)
    with closing(GatewayLink(b"s" * 32, "tcp://127.0.0.1:*", 1 << 20)) as link:
        parts = build(config, folder, seat, link, lambda num_done, num_all: None)
        with parts.resources:
            yield parts.engine
    assert (gpu.num_replays > 0) is request.param


def request(idx, rng, vocab):
    prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))]
    return Sequence(f"r{idx}", 0, b"gw", prompt, len(prompt), SamplingParams(8, idx, temperature=0.0), 0, idx)


def serve(engine, seqs, on_turn=lambda turn: None):
    for seq in seqs:
        engine.scheduler.add(seq)
    outputs = {}
    for turn in range(20_000):
        if engine.scheduler.idle:
            engine.scheduler.check()
            return outputs
        on_turn(turn)
        for output in engine.run_once(0.0):
            outputs.setdefault(output.progress.seq.req_id, []).extend(output.progress.ids)
    raise AssertionError("requests did not finish")


def check(seqs, outputs):
    folder = resolve_model("dummy:step3-tiny")
    attention = load_attention_half(folder, select("cpu", "float32"))
    ffn = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "float32"))
    for seq in seqs:
        verdict = compare(reference_generate(attention, [ffn], seq.prompt_ids(), seq.sampling), outputs[seq.req_id])
        assert verdict.ok, (seq.req_id, verdict)


def test_a_mono_worker_on_a_gpu_equals_the_reference(engine):
    rng = random.Random(0)
    assert isinstance(engine, AttentionEngine)
    seqs = [request(idx, rng, 512) for idx in range(6)]
    check(seqs, serve(engine, seqs))
    totals = engine.stages.totals
    assert totals.ffn_s > 0 and totals.attention_s > 0 and totals.head_s > 0


def test_a_failure_with_stages_on_the_gpu_runs_their_steps_again(engine):
    rng = random.Random(1)
    seqs = [request(idx, rng, 512) for idx in range(4)]

    def disturb(turn):
        if turn % 40 == 39 and turn < 400:
            engine.fail()

    check(seqs, serve(engine, seqs, disturb))


def test_steps_that_capture_teach_nothing(engine, gpu):
    """Each waits for the GPU once a layer, which later steps do not."""
    rng, samples = random.Random(2), []
    engine.stages.observer = samples.append
    serve(engine, [request(0, rng, 512)], lambda turn: engine.stages.deliver())
    engine.stages.deliver()
    num_layers = resolve_model("dummy:step3-tiny").spec.num_layers
    assert gpu.num_captures % num_layers == 0
    assert len(samples) == engine.stages.totals.num_steps - gpu.num_captures // num_layers


class RecordingExchange:
    ready = True

    def __init__(self):
        self.sent, self.cancelled, self.lost = [], 0, False

    def send(self, stream, step, dispatch):
        if self.lost:
            raise PeerLostError("ffn/0 is lost: scripted")
        self.sent.append((stream, step, dispatch))

    def poll(self, timeout_s):
        return []

    def cancel(self):
        self.cancelled += 1


class Half:
    """Of a layer whose rows are its stream's number."""

    def __init__(self, device):
        self.device = device

    def embed(self, token_ids):
        return to_device(torch.zeros(2, 200), self.device) + token_ids[:, None]

    def layer(self, layer, x, batch, cache, partials):
        ids = to_device(torch.tensor([[1], [2]], dtype=torch.int32), self.device)
        return Dispatch(layer, x, ids, to_device(torch.ones(2, 1), self.device))


@pytest.fixture
def path(gpu):
    gpu.may_wait = False
    device, exchange = CudaDevice(), RecordingExchange()
    path = GpuPath(Half(device.torch_device), None, exchange, device, wire=WireDtype.FP8_E4M3)

    def launch(stream):
        step = Step(SimpleNamespace(stream=stream, step=7), None, 0.0)
        with path.stage(stream):
            assert path.begin(step, [stream, stream]) is None

    return SimpleNamespace(face=path, exchange=exchange, launch=launch)


def test_rows_are_sent_when_their_layer_is_over_and_not_before(path, gpu):
    path.launch(1)
    path.launch(2)
    path.face.poll(0.0)
    assert not path.exchange.sent and not path.face.finished()
    legs = []
    for _ in range(gpu.looks):
        path.face.poll(0.0)
        legs += path.face.finished()
    assert sorted((leg.stream, leg.first_layer, leg.last_layer) for leg in legs) == [(1, 0, 0), (2, 0, 0)]
    assert all(leg.answer is None and leg.spans.attention_s > 0 for leg in legs)
    stream, step, dispatch = path.exchange.sent[1]
    assert (stream, step, dispatch.layer) == (2, 7, 0)
    assert dispatch.rows.dtype is torch.float8_e4m3fn and dispatch.scales.shape == (2, 2)
    assert dispatch.rows.float()[0, 0] * dispatch.scales[0, 0] == 2.0
    assert dispatch.expert_ids.tolist() == [[1], [2]] and dispatch.expert_weights.tolist() == [[1.0], [1.0]]


def test_what_was_cancelled_is_not_sent(path, gpu):
    path.launch(0)
    path.face.cancel()
    for _ in range(gpu.looks + 1):
        path.face.poll(0.0)
    assert path.exchange.cancelled == 1 and not path.exchange.sent and not path.face.finished()


def test_a_peer_lost_meanwhile_shows_when_the_rows_leave(path, gpu):
    path.exchange.lost = True
    path.launch(0)
    with pytest.raises(PeerLostError):
        for _ in range(gpu.looks + 1):
            path.face.poll(0.0)

"""The engines of a GPU's workers give the reference's tokens: over a GPU in pure Python here, over CUDA with `-m gpu`.

The twin raises where the host would wait for the GPU, read what is not there yet, or use what another stream has not
finished (tests/fakes/cuda.py). What CUDA itself does only the real thing shows.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from afd.model.expert_load import ExpertLoad
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import compare, reference_generate
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import DispatchMode, FfnParallel
from stepmesh.types import WireDtype
from tests.fakes import cuda
from tests.fakes.engine_pod import Pod, requests
from tests.fakes.real_gpu import skip_without_gpu


class Twins:
    """One GPU for each engine, as each has its process."""

    def __init__(self, monkeypatch):
        cuda.install(monkeypatch)
        # Measuring an expert's output waits for it, in one batch of 64.
        monkeypatch.setattr(ExpertLoad, "begin_batch", lambda load: False)
        self.gpus = []

    def __call__(self):
        self.gpus.append(cuda.FakeCuda())
        return self.gpus[-1].entered


@pytest.fixture(params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu_context(request, monkeypatch):
    torch.set_num_threads(1)
    if request.param == "twin":
        return Twins(monkeypatch)
    skip_without_gpu()
    return lambda: contextlib.nullcontext


@pytest.fixture
def make_pod(gpu_context):
    with contextlib.ExitStack() as stack:

        def make(folder, *args, **options):
            pod = Pod(folder, *args, device="cuda", new_context=gpu_context, **options)
            stack.callback(pod.close)
            return pod

        yield make


def reference_of(folder):
    attention = load_attention_half(folder, select("cpu", "float32"))
    ffn = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "float32"))
    return lambda seq, ids: compare(reference_generate(attention, [ffn], seq.prompt_ids(), seq.sampling), ids)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize(
    ("model", "num_attention", "num_ffn", "transport", "streams", "parallel", "dispatch"),
    [
        ("step3-tiny", 1, 1, "shm", 1, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        ("step3-tiny", 2, 1, "shm", 3, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        ("step3-tiny", 1, 2, "tcp", 3, FfnParallel.TP, DispatchMode.BROADCAST),
        ("step3-tiny", 2, 3, "shm", 2, FfnParallel.EP, DispatchMode.SPARSE),
        ("step3-tiny", 2, 2, "shm", 2, FfnParallel.EP, DispatchMode.BROADCAST),
        ("llama-tiny", 1, 1, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        ("step3.5-flash-tiny", 1, 1, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        ("deepseek-v3-tiny", 1, 1, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        ("qwen3-moe-tiny", 1, 2, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
    ],
)
def test_every_request_gets_the_references_tokens(
    make_pod, gpu_context, caplog, model, num_attention, num_ffn, transport, streams, parallel, dispatch, graphs
):
    if graphs and num_attention > 1 and not isinstance(gpu_context, Twins):
        pytest.skip("threads of one process: one would wait for the GPU while another captures")
    folder = resolve_model(f"dummy:{model}")
    pod = make_pod(
        folder,
        num_attention,
        num_ffn,
        transport=transport,
        streams=streams,
        parallel=parallel,
        dispatch=dispatch,
        graphs=graphs,
    )
    loads = [list(requests(5, seed, folder.spec.vocab_size)) for seed in range(num_attention)]
    with ThreadPoolExecutor(num_attention) as pool:
        results = list(pool.map(pod.run, range(num_attention), loads))
    for captured in pod.decode_graphs if graphs else ():
        assert captured.num_replayed >= captured.num_captured > 0
    assert "CUDA graphs are off" not in caplog.text
    check = reference_of(folder)
    for load, (outputs, losses) in zip(loads, results, strict=True):
        assert losses == 0
        for seq in load:
            verdict = check(seq, outputs[seq.req_id])
            assert verdict.ok, (seq.req_id, verdict)
    if isinstance(gpu_context, Twins):
        for gpu in gpu_context.gpus:
            assert gpu.num_waits == 0 and gpu.num_uploads and gpu.num_downloads
            assert gpu.num_looks >= gpu.looks * gpu.num_events / 3, "events complete only after some looks"
            assert len(gpu.streams) == 1 + streams


def test_the_default_model(make_pod):
    folder = resolve_model("smollm2-135m-instruct")
    pod = make_pod(folder, 1, 1, streams=2)
    load = list(requests(3, 3, folder.spec.vocab_size, max_tokens=4))
    outputs, _ = pod.run(0, load)
    check = reference_of(folder)
    assert all(check(seq, outputs[seq.req_id]).ok for seq in load)


@pytest.mark.parametrize("most_captures", [0, 5])
@pytest.mark.parametrize("gpu_context", ["twin"], indirect=True)
def test_where_a_layer_cannot_be_captured_all_are_launched(make_pod, gpu_context, caplog, most_captures):
    folder = resolve_model("dummy:step3-tiny")
    pod = make_pod(folder, 1, 1, streams=2, graphs=True)
    gpu = gpu_context.gpus[1]
    gpu.most_captures = most_captures
    load = list(requests(5, 4, folder.spec.vocab_size))
    outputs, _ = pod.run(0, load)
    check = reference_of(folder)
    assert all(check(seq, outputs[seq.req_id]).ok for seq in load)
    assert gpu.num_captures == most_captures + 1, "it is not tried again"
    assert "CUDA graphs are off, layer" in caplog.text and "not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize("gpu_context", ["twin"], indirect=True)  # rounding to float8 magnifies a last bit
def test_float8_rows_leave_and_reach_the_gpu_with_their_scales(make_pod):
    """Rows are rounded before they cross, so that the answer is near the reference's, and the same on any device."""
    folder = resolve_model("dummy:step3-tiny")
    outputs = []
    for device in ("cpu", "cuda"):
        if device == "cuda":
            pod = make_pod(folder, 1, 1, wire=WireDtype.FP8_E4M3)
        else:
            pod = Pod(folder, 1, 1, wire=WireDtype.FP8_E4M3)
        try:
            outputs.append(pod.run(0, list(requests(4, 8, folder.spec.vocab_size)))[0])
        finally:
            pod.close()
    assert outputs[0] == outputs[1]


def test_sampled_tokens_and_logprobs_come_from_whole_logits(make_pod):
    folder = resolve_model("dummy:step3-tiny")
    sampling = {"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.1, "logprobs": 2}
    pod = make_pod(folder, 1, 1, streams=3)
    load = list(requests(6, 5, folder.spec.vocab_size, **sampling))
    outputs, _ = pod.run(0, load)
    check = reference_of(folder)
    assert all(check(seq, outputs[seq.req_id]).ok for seq in load)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
def test_a_replaced_ffn_rank_interrupts_and_changes_nothing(make_pod, graphs):
    """Rank 1 of 2 vanishes with stages on the GPU and rows under way; a successor joins; steps run again."""
    folder = resolve_model("dummy:step3-tiny")
    pod = make_pod(folder, 1, 2, graphs=graphs)
    load = list(requests(6, 1, folder.spec.vocab_size))

    def disturb(turn):
        if pod.epoch == 1 and any(seq.num_output == 2 for seq in load):
            pod.replace_last_ffn()

    outputs, losses = pod.run(0, load, disturb)
    assert losses >= 1
    check = reference_of(folder)
    assert all(check(seq, outputs[seq.req_id]).ok for seq in load)


def test_times_are_those_of_the_gpu(make_pod):
    """A stage lasts from its first kernel to the end of its copies; the host's time in between is no waiting."""
    folder = resolve_model("dummy:step3-tiny")
    pod = make_pod(folder, 1, 1, streams=2)
    pod.run(0, list(requests(5, 2, folder.spec.vocab_size)))
    [engine], [(ffn, _, _)] = pod.engines, pod.ffns
    stages = engine.stages.totals
    assert stages.attention_s > 0 and stages.head_s > 0 and 0 < stages.ffn_s < stages.exchange_s
    assert ffn.totals.busy_s > 0
    first, *_, last = engine.stages.ring.snapshot()
    assert stages.wait_s < last.end_s - first.start_s

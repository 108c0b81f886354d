"""Attention and FFN engines joined by real meshes inside one process: one thread each, no cluster around them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import compare, reference_generate
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import DispatchMode, FfnParallel
from stepmesh.types import DispatchMeta, DispatchParts, PeerDown
from tests.fakes.engine_pod import Pod, requests


@pytest.fixture(scope="module")
def folder():
    torch.set_num_threads(1)
    return resolve_model("dummy:step3-tiny")


@pytest.fixture
def make_pod(folder):
    pods = []

    def make(*args, **kwargs):
        pods.append(Pod(folder, *args, **kwargs))
        return pods[-1]

    yield make
    for pod in pods:
        pod.close()


@pytest.fixture(scope="module")
def check(folder):
    attention = load_attention_half(folder, select("cpu", "float32"))
    ffn = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "float32"))

    def verdict(seq, ids):
        return compare(reference_generate(attention, [ffn], seq.prompt_ids(), seq.sampling), ids).ok

    return verdict


@pytest.mark.parametrize(
    ("num_attention", "num_ffn", "transport", "streams", "parallel", "dispatch"),
    [
        (1, 1, "shm", 1, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        (1, 2, "tcp", 3, FfnParallel.TP, DispatchMode.BROADCAST),
        (2, 1, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        (2, 3, "shm", 2, FfnParallel.HYBRID, DispatchMode.BROADCAST),
        (3, 2, "tcp", 2, FfnParallel.TP, DispatchMode.BROADCAST),
        (1, 1, "shm", 2, FfnParallel.EP, DispatchMode.SPARSE),
        (1, 7, "shm", 1, FfnParallel.EP, DispatchMode.SPARSE),
        (2, 2, "tcp", 3, FfnParallel.EP, DispatchMode.SPARSE),
        (3, 3, "shm", 2, FfnParallel.EP, DispatchMode.SPARSE),
    ],
)
def test_every_request_gets_the_references_tokens(
    make_pod, folder, check, num_attention, num_ffn, transport, streams, parallel, dispatch
):
    pod = make_pod(num_attention, num_ffn, transport=transport, streams=streams, parallel=parallel, dispatch=dispatch)
    loads = [list(requests(5, seed, folder.spec.vocab_size)) for seed in range(num_attention)]
    with ThreadPoolExecutor(num_attention) as pool:
        results = list(pool.map(pod.run, range(num_attention), loads))
    for load, (outputs, losses) in zip(loads, results, strict=True):
        assert losses == 0
        for seq in load:
            assert check(seq, outputs[seq.req_id]), seq.req_id
    for engine, _, _ in pod.ffns:
        assert not engine.gangs.has_pending and not engine.gangs.num_stragglers
    # Every rank took part in every exchange, whatever rows it was sent.
    assert len({engine.totals.num_members for engine, _, _ in pod.ffns}) == 1


def test_new_epochs_are_adopted_without_a_pause(make_pod, folder, check):
    """Membership changes that leave the FFN side alone interrupt nobody, in whatever layer a stream is."""
    pod = make_pod(1, 2, streams=3)
    load = list(requests(8, 2, folder.spec.vocab_size))

    def disturb(turn):
        if turn % 25 == 24:
            pod.adopt(pod.epoch + 1)

    outputs, losses = pod.run(0, load, disturb)
    assert losses == 0 and pod.epoch > 4
    for seq in load:
        assert check(seq, outputs[seq.req_id])


def test_a_replaced_ffn_rank_interrupts_and_changes_nothing(make_pod, folder, check):
    """Rank 1 of 2 vanishes mid-step; a successor joins in a new epoch; interrupted steps run again."""
    pod = make_pod(1, 2)
    load = list(requests(6, 1, folder.spec.vocab_size))

    def disturb(turn):
        if pod.epoch == 1 and any(seq.num_output == 2 for seq in load):
            pod.replace_last_ffn()

    outputs, losses = pod.run(0, load, disturb)
    assert losses >= 1
    for seq in load:
        assert check(seq, outputs[seq.req_id])


def test_sparse_dispatch_sends_each_rank_fewer_rows(make_pod, folder):
    """Rows received by both ranks; a decoding token hits an expert of a rank, or its shared expert, or neither."""
    rows = {}
    for dispatch in DispatchMode:
        pod = make_pod(1, 2, streams=1, parallel=FfnParallel.EP, dispatch=dispatch)
        pod.run(0, list(requests(6, 4, folder.spec.vocab_size)))
        rows[dispatch] = [engine.totals.num_tokens for engine, _, _ in pod.ffns]
    assert rows[DispatchMode.BROADCAST][0] == rows[DispatchMode.BROADCAST][1]
    assert all(few < all_ for few, all_ in zip(rows[DispatchMode.SPARSE], rows[DispatchMode.BROADCAST], strict=True))


@pytest.mark.parametrize("dispatch", DispatchMode)
@pytest.mark.parametrize(
    ("layer", "expert", "reason"), [(99, None, "layer 99, the model has 5"), (1, 8, "expert 8 of")]
)
def test_a_dispatch_that_names_what_does_not_exist_ends_its_connection_only(
    make_pod, folder, check, dispatch, layer, expert, reason
):
    """One attention worker goes mad between two requests of the other; the FFN worker serves on, both afterwards."""
    pod = make_pod(2, 1, dispatch=dispatch, parallel=FfnParallel.EP)
    honest, mad = list(requests(3, 5, folder.spec.vocab_size)), pod.attention_meshes[1]
    pod.run(1, list(requests(1, 6, folder.spec.vocab_size)))  # both are connected
    ids = None if expert is None else np.array([[0, 1, expert]], np.int32)
    weights = None if expert is None else np.ones((1, 3), np.float32)
    parts = DispatchParts(np.zeros((1, folder.spec.hidden), np.float32), None, ids, weights)
    peers, meta = [pod.ffn_meshes[0].id], DispatchMeta(0, 1, 9, layer, gang_id=1, member_mask=0b11)
    if dispatch is DispatchMode.SPARSE:
        mad.dispatch_sparse(peers, meta, parts, [np.arange(1)])
    else:
        mad.dispatch(peers, meta, parts)
    outputs, losses = pod.run(0, honest)
    assert losses == 0
    for seq in honest:
        assert check(seq, outputs[seq.req_id])
    down = next(event for _ in range(100) for event in mad.progress(0.05) if isinstance(event, PeerDown))
    assert reason in down.reason and down.retryable
    assert pod.ffn_meshes[0].stats()["peers"]["attention/1"]["rejected_frames"] == 1
    assert pod.ffns[0][2].is_alive()

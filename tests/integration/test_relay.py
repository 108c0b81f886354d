"""Engines whose native code makes the exchanges by itself: same tokens, same books, and a way out of everything."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from afd.model import presets
from afd.model.loading import resolve_model
from afd.relay import runs
from afd.relay.native import Outcome
from afd.relay.runs import AttentionRelay, FfnRelay
from stepmesh.native import native
from stepmesh.types import (
    Role,
    WireDtype,
)
from tests.fakes.engine_pod import Pod, requests
from tests.fakes.native_ops import native_ops

pytestmark = [
    pytest.mark.usefixtures("patient_relays"),
    pytest.mark.skipif(
        native is None or native_ops() is None,
        reason="native code was not built: setup.py build_ext --inplace",
    ),
]

BOTH = (Role.ATTENTION, Role.FFN)
MODELS = ("dummy:qwen3-tiny", "dummy:llama-tiny", "dummy:dense-tiny")


@pytest.fixture(autouse=True)
def dense_tiny(monkeypatch):
    """Step-3.5-Flash, sliding windows and other layers in turn, with experts in the last layer only."""
    preset = {**presets.PRESETS["step3.5-flash-tiny"], "moe_layers_enum": "5"}
    monkeypatch.setitem(presets.PRESETS, "dense-tiny", preset)


@pytest.fixture
def laps(monkeypatch) -> Counter:
    """Layers that went through native code, by side; and steps that began there, by (side, "begin")."""
    counted: Counter = Counter()
    for side in (AttentionRelay, FfnRelay):
        for name in ("run", "begin"):
            plain = getattr(side, name)

            def run(self, *args, side=side, name=name, plain=plain):
                done = plain(self, *args)
                counted[side] += done.num_laps
                counted[side, name] += done.num_laps > 0
                counted[done.outcome] += 1
                return done

            monkeypatch.setattr(side, name, run)
    return counted


def serve(model, relays, *, streams=1, transport="shm", seed=1):
    """Output ids by request, and what engines and meshes have counted."""
    folder = resolve_model(model)
    pod = Pod(
        folder,
        1,
        1,
        transport=transport,
        streams=streams,
        dtype="bfloat16",
        wire=WireDtype.BF16,
        relays=relays,
    )
    try:
        outputs, losses = pod.run(0, list(requests(5, seed, folder.spec.vocab_size)))
        assert losses == 0
        engine, totals = pod.ffns[0][0], pod.engines[0].stages.totals
        pod.stop.set()
        pod.ffns[0][2].join(10)
        [peer] = pod.attention_meshes[0].stats()["peers"].values()
        counts = {
            "exchanges": totals.num_exchanges,
            "gang members": totals.num_gang_members,
            "steps": totals.num_steps,
            "batches": engine.totals.num_batches,
            "rows": engine.totals.num_tokens,
            "members": engine.totals.num_members,
            **{name: peer[name] for name in ("sent_messages", "sent_bytes", "received_messages", "received_bytes")},
        }
        times = dataclasses.asdict(totals) | {f"ffn {k}": v for k, v in dataclasses.asdict(engine.totals).items()}
        assert all(value >= 0.0 for value in times.values()), times
        when_late = ("wait", "look_ahead")  # stages that there are only where an answer is not there at once
        ring = pod.engines[0].stages.ring.snapshot()
        stages = Counter((s.name, s.layer) for s in ring if s.name not in when_late)
        ffn_stages = Counter((s.name, s.layer) for s in engine.ring.snapshot() if s.name in ("ffn", "combine"))
        for ring in (pod.engines[0].stages.ring, engine.ring):
            ends = [stage.end_s for stage in ring.snapshot()]
            assert ends == sorted(ends) and all(s.start_s <= s.end_s for s in ring.snapshot())
        del stages["combine", -1]
        return outputs, counts, (stages, ffn_stages)
    finally:
        pod.close()


@pytest.mark.parametrize("model", MODELS)
def test_tokens_and_books_are_the_same_as_without(model, laps):
    plain, relayed = serve(model, ()), serve(model, BOTH)
    assert relayed[0] == plain[0]
    assert relayed[1] == plain[1]
    for mine, theirs in zip(relayed[2], plain[2], strict=True):
        # The layer adds the partials itself either way: a combine of no duration is not noted by native code.
        keep = {k: n for k, n in theirs.items() if k[0] != "combine" or theirs is plain[2][1]}
        assert {k: n for k, n in mine.items() if k in keep} == keep
    # Whether a step begins in the FFN side's native code is a matter of who waited for it when it came.
    begun = laps[FfnRelay, "begin"]
    assert laps[AttentionRelay] == laps[FfnRelay] + relayed[1]["steps"] - begun
    assert laps[AttentionRelay, "begin"] == relayed[1]["steps"] and (begun > 0) is (model != "dummy:dense-tiny")


@pytest.mark.parametrize("relays", [(Role.ATTENTION,), (Role.FFN,)])
def test_one_side_that_relays_gets_on_with_one_that_does_not(relays, laps):
    model = "dummy:qwen3-tiny"
    assert serve(model, relays)[:2] == serve(model, ())[:2]
    assert laps[AttentionRelay if Role.ATTENTION in relays else FfnRelay] > 0


@pytest.mark.parametrize(("streams", "transport"), [(2, "shm"), (1, "tcp")])
def test_it_stands_back_where_it_cannot_or_others_would_wait(streams, transport, laps):
    """A second stream, or a transport that is no shared memory."""
    model = "dummy:qwen3-tiny"
    kwargs = {"streams": streams, "transport": transport}
    assert serve(model, BOTH, **kwargs)[0] == serve(model, (), **kwargs)[0]
    if streams == 1:
        assert not laps[FfnRelay] and not laps[AttentionRelay]


def test_a_side_that_waits_in_vain_stops_relaying_for_the_step(monkeypatch, laps):
    monkeypatch.setattr(runs, "PATIENCE_S", 0.0)
    model = "dummy:qwen3-tiny"
    assert serve(model, BOTH)[:2] == serve(model, ())[:2]
    assert laps[Outcome.LATE] > 0


def test_without_time_nothing_is_relayed(monkeypatch, laps):
    monkeypatch.setattr(runs, "RELAY_S", 0.0)
    model = "dummy:qwen3-tiny"
    assert serve(model, BOTH)[:2] == serve(model, ())[:2]
    assert laps[Outcome.TIME_OVER] > 0 and not laps[AttentionRelay]

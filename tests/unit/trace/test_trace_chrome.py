"""The Chrome trace: viewers' rules, and what was written can be read back."""

from __future__ import annotations

import itertools
import json

import pytest

from afd.telemetry.ring import Stage
from afd.trace.chrome import from_chrome, to_chrome
from afd.trace.errors import TraceError
from afd.trace.timeline import Timeline, Worker
from tests.fakes.trace import two_to_one


def written(timeline: Timeline) -> str:
    return "".join(to_chrome(timeline))


def test_what_was_written_is_read_back_to_the_nanosecond():
    timeline = two_to_one()
    again = from_chrome(written(timeline), "x.json")
    assert (again.title, again.seconds, again.missing) == (timeline.title, timeline.seconds, timeline.missing)
    for before, after in zip(timeline.workers, again.workers, strict=True):
        assert (before.name, before.pid, len(before.stages)) == (after.name, after.pid, len(after.stages))
        for one, other in zip(before.stages, after.stages, strict=True):
            assert (one.name, one.stream, one.layer, one.step) == (other.name, other.stream, other.layer, other.step)
            assert (one.gang_id, one.gang_size, one.epoch) == (other.gang_id, other.gang_size, other.epoch)
            assert abs(one.start_s - other.start_s) < 1e-9 and abs(one.end_s - other.end_s) < 1e-9
    assert written(again) == written(from_chrome(written(again), "y.json"))


def test_no_two_slices_of_a_track_overlap():
    overlapping = tuple(Stage("gang_wait", 0.1 * k, 0.1 * k + 0.25, 0, k) for k in range(6))
    for timeline in (two_to_one(), Timeline((Worker("ffn", 0, 1, overlapping),), 1.0)):
        tracks: dict[tuple[int, int], list[dict]] = {}
        for event in json.loads(written(timeline))["traceEvents"]:
            if event["ph"] == "X":
                tracks.setdefault((event["pid"], event["tid"]), []).append(event)
        assert tracks
        for events in tracks.values():
            events.sort(key=lambda event: event["ts"])
            for before, after in itertools.pairwise(events):
                assert round((before["ts"] + before["dur"]) * 1e3) <= round(after["ts"] * 1e3)


def test_arrows_begin_and_end_on_slices():
    events = json.loads(written(two_to_one(num_steps=1)))["traceEvents"]
    slices = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in events if e["ph"] == "X"}
    begins = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(begins) == len(ends) == 2 * 4 * 2 * 2  # streams, layers, attention workers, there and back
    for idx, begin in begins.items():
        end = ends[idx]
        names = [slices[e["pid"], e["tid"], e["ts"]].split()[0] for e in (begin, end)]
        assert names in (["dispatch", "ffn"], ["combine", "combine"])
        assert begin["ts"] < end["ts"] and begin["pid"] != end["pid"]


def test_processes_and_tracks_have_names():
    events = json.loads(written(two_to_one()))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"].endswith("_name")}
    assert {"attention/0", "attention/1", "ffn/0", "stream 0", "stream 1", "waiting"} <= names


def test_the_error_of_the_clocks_is_in_the_file():
    timeline = Timeline((Worker("ffn", 0, 1, (), 25e-6, 0.5),), 1.0, missing=("attention/0 is gone",))
    about = json.loads(written(timeline))["otherData"]
    assert about["workers"][0]["clock_error_us"] == 25.0 and about["missing"] == ["attention/0 is gone"]
    again = from_chrome(written(timeline), "x").workers[0]
    assert (again.clock_error_s, again.complete_from_s) == pytest.approx((25e-6, 0.5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"traceEvents": []}',
        '{"otherData": {"format": "other"}, "traceEvents": []}',
        '{"otherData": {"format": "afd-trace-1", "workers": [{"name": "x"}]}, "traceEvents": []}',
        '{"otherData": {"format": "afd-trace-1", "workers": []}, "traceEvents": [{"ph": "X", "pid": 1}]}',
        written(Timeline((Worker("ffn", 0, 1, (Stage("ffn", 0.0, 1.0, 10**9),)),), 1.0)),
        b"\xff\xfe",
        "[" * 100_000,
    ],
)
def test_any_other_file_is_refused_by_name(text):
    with pytest.raises(TraceError, match=r"notes\.txt"):
        from_chrome(text, "notes.txt")

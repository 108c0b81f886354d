"""The trace in a few lines of text: where each worker's time went, and how far its clock may be off. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from afd.trace.clocks import Offset
from afd.trace.pipeline import exposed_spans, pipeline_of, total
from afd.trace.timeline import ATTENTION, COMPUTING, FFN, Timeline, Worker

COLUMNS = ("attention", "dispatch", "combine", "head", "look_ahead", "ffn")
_COUNTED_AS = {"embed": "attention", "head_slice": "head"}


def stage_shares(worker: Worker, seconds: float) -> dict[str, float]:
    """Stage -> share of the trace's time (0..1), embedding counted as attention; "busy": all computing."""
    shares = dict.fromkeys((*COLUMNS, "wait", "busy"), 0.0)
    for stage in worker.stages:
        share = (min(stage.end_s, seconds) - max(stage.start_s, 0.0)) / seconds
        name = _COUNTED_AS.get(stage.name, stage.name)
        if name in shares:
            shares[name] += share
        if stage.name in COMPUTING:
            shares["busy"] += share
    return shares


def mean_gang(worker: Worker) -> float:
    """Attention workers a batch, weighted by batch; 0 where there is none."""
    sizes = [s.gang_size for s in worker.stages if s.name == ("ffn" if worker.role == FFN else "exchange")]
    return sum(sizes) / len(sizes) if sizes else 0.0


def mean_round_trip_s(worker: Worker) -> float:
    """Mean time from dispatch to the arrival of all answers; 0 where there is none."""
    times = [s.end_s - s.start_s for s in worker.stages if s.name == "exchange"]
    return sum(times) / len(times) if times else 0.0


def summary_text(timeline: Timeline, offsets: Mapping[str, Offset] | None = None) -> str:
    """A table of shares, then clocks, then what is missing."""
    header = (
        "WORKER",
        "BUSY",
        *(name.upper().replace("_", " ") for name in COLUMNS),
        "WAIT",
        "EXPOSED",
        "ROUND TRIP",
        "GANG",
        "STAGES",
    )
    rows = [header]
    for worker in timeline.workers:
        shares = stage_shares(worker, timeline.seconds)
        exposed = total(exposed_spans(timeline, worker), timeline.seconds) / timeline.seconds
        trip_s, gang = mean_round_trip_s(worker), mean_gang(worker)
        rows.append(
            (
                worker.name,
                *(f"{shares[name]:.1%}" if shares[name] else "-" for name in ("busy", *COLUMNS, "wait")),
                f"{exposed:.1%}" if worker.role == ATTENTION else "-",
                f"{trip_s * 1e3:.2f} ms" if trip_s else "-",
                f"{gang:.2f}" if gang else "-",
                str(len(worker.stages)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += _cycle_lines(timeline)
    lines += _clock_lines(offsets or {})
    for worker in timeline.workers:
        if worker.complete_from_s > 0.0:
            lines.append(
                f"{worker.name}: its ring holds the last {timeline.seconds - worker.complete_from_s:.2f} s only; "
                f"ask for fewer --seconds"
            )
    lines += [f"missing: {reason}" for reason in timeline.missing]
    return "\n".join(lines)


def _cycle_lines(timeline: Timeline) -> list[str]:
    """What bounds a step, where the trace holds one."""
    found = pipeline_of(timeline)
    if found is None:
        return []
    terms = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in found.terms.items())
    streams = "1 stream makes a step" if found.num_streams == 1 else f"{found.num_streams} streams make a step each"
    return [
        f"{streams} in {found.cycle_s * 1e3:.1f} ms; "
        f"closed form: {found.closed_form_s * 1e3:.1f} ms, the largest of {terms} ms; "
        f"with heads {found.predicted_s * 1e3:.1f} ms"
    ]


def _clock_lines(offsets: Mapping[str, Offset]) -> list[str]:
    lines = []
    for name, offset in offsets.items():
        measured, used = offset.measured, offset.used
        text = f"clock of {name}: {measured.offset_s * 1e6:+.0f} us from here, error {measured.error_s * 1e6:.0f} us"
        if used != measured:
            shared = "the same clock as here" if used.offset_s == used.error_s == 0.0 else "shared with its machine"
            text += f"; used {used.offset_s * 1e6:+.0f} us, error {used.error_s * 1e6:.0f} us ({shared})"
        lines.append(text)
    return lines

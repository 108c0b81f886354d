"""What a storm did to the streams: losses, token times and who served whom -> one line for each kind of loss. Pure.

All times are seconds of one clock. A stream is concerned by a loss when it ran at a worker that was lost, by the loss
of an FFN worker always (all are), by that of a coordinator never. Its pause is the longest time without a token
between the loss and the next one. What runs meanwhile without being concerned is a bystander.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from afd.load.metrics import percentile
from bench.storm.plan import Loss


@dataclass(slots=True)
class Stream:
    """One request as its client saw it.

    request_id: the server's name for it; "" before its first event.
    token_s: when each event with tokens came.
    error: how it ended, if not complete.
    refused: an error before anything was taken (HTTP 429 or 503).
    num_wrong: tokens that differ from the undisturbed run's by more than rounding; known after the storm.
    server: the gateway that it was sent to.
    """

    prompt_idx: int
    sent_s: float
    request_id: str = ""
    token_s: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ended_s: float = 0.0
    error: str = ""
    refused: bool = False
    num_wrong: int = 0
    server: int = 0

    def runs_at(self, at_s: float) -> bool:
        """It has a token by then, and not all of them."""
        return bool(self.token_s) and self.token_s[0] <= at_s < self.ended_s

    def last_s(self, at_s: float) -> float:
        """When its last token before `at_s` came, of a stream that runs then."""
        return self.token_s[bisect_right(self.token_s, at_s) - 1]

    def longest_gap_s(self, begin_s: float, end_s: float) -> float:
        """The longest time without a token of those that reach into [begin, end). It lasts until the next token, the
        stream's end in an error, or `end_s`: what comes behind that is another loss's."""
        moments = [*self.token_s, self.ended_s] if self.error else self.token_s
        return max((min(b, end_s) - a for a, b in pairwise(moments) if b > begin_s and a < end_s), default=0.0)


@dataclass(frozen=True, slots=True)
class Placement:
    """A request went to an attention worker."""

    at_s: float
    request_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class Happened:
    """One loss of the storm.

    at_s: when its processes were lost.
    until_s: when the next loss came, or the storm ended.
    whole_s: when every process was there and ready again; None = not before the next loss, or not in time.
    """

    loss: Loss
    at_s: float
    until_s: float
    whole_s: float | None


@dataclass(slots=True)
class Line:
    """Losses of one kind together.

    num_concerned: streams.
    num_lost, num_refused: streams that ended in an error, or were refused, between such a loss and the next one.
    num_wrong: tokens of the streams that ended then.
    gaps_s: the longest gap of each bystander.
    first_s: from sending to the first token of what was sent before the cluster was whole again.
    whole_s: from the loss until then.
    num_unhealed: losses after which it was not whole in time.
    num_unmeasured: losses whose times do not count, since the machine stood still meanwhile.
    """

    kind: str
    num_losses: int = 0
    num_concerned: int = 0
    num_lost: int = 0
    num_refused: int = 0
    num_wrong: int = 0
    num_unhealed: int = 0
    num_unmeasured: int = 0
    pauses_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


def account(
    streams: Sequence[Stream],
    placements: Iterable[Placement],
    happened: Sequence[Happened],
    standstills: Sequence[tuple[float, float]] = (),
) -> list[Line]:
    """One line for each kind of loss, in the order in which they came first.

    standstills: from when to when the observer itself could not run. Times of a loss do not count where one of them
    reaches into its gaps.
    """
    ways = defaultdict(list)
    for placement in sorted(placements, key=lambda placement: placement.at_s):
        ways[placement.request_id].append(placement)
    lines: dict[str, Line] = {}
    for event in happened:
        line = lines.setdefault(event.loss.kind, Line(event.loss.kind))
        line.num_losses += 1
        line.num_unhealed += event.whole_s is None and not event.loss.hasty
        _count_ends(line, [stream for stream in streams if event.at_s <= stream.ended_s < event.until_s])
        begin_s = min(
            (stream.last_s(event.at_s) for stream in streams if stream.runs_at(event.at_s)), default=event.at_s
        )
        is_measured = not any(begin < event.until_s and end > begin_s for begin, end in standstills)
        line.num_unmeasured += not is_measured
        for stream in streams:
            concerned = stream.runs_at(event.at_s) and _is_concerned(event, ways[stream.request_id])
            line.num_concerned += concerned
            if is_measured:
                _measure(line, stream, event, concerned)
        if is_measured and event.whole_s is not None:
            line.whole_s.append(event.whole_s - event.at_s)
    return list(lines.values())


def _count_ends(line: Line, ended: list[Stream]) -> None:
    line.num_refused += sum(stream.refused for stream in ended)
    line.num_lost += sum(bool(stream.error) and not stream.refused for stream in ended)
    line.num_wrong += sum(stream.num_wrong for stream in ended)


def _measure(line: Line, stream: Stream, event: Happened, concerned: bool) -> None:
    if stream.runs_at(event.at_s):
        (line.pauses_s if concerned else line.gaps_s).append(stream.longest_gap_s(event.at_s, event.until_s))
    elif stream.token_s and stream.token_s[0] > event.at_s and stream.sent_s < (event.whole_s or event.until_s):
        line.first_s.append(stream.token_s[0] - stream.sent_s)


def _is_concerned(event: Happened, way: list[Placement]) -> bool:
    """way: where the stream has been, in the order of time."""
    if "ffn" in event.loss.roles or "gateway" in event.loss.roles:
        return True
    before = [placement for placement in way if placement.at_s <= event.at_s]
    return bool(before) and f"attention/{before[-1].rank}" in event.loss.targets


def undisturbed_gaps_s(streams: Sequence[Stream], begin_s: float, end_s: float, window_s: float) -> list[float]:
    """The longest gap of each stream in each window of an undisturbed time: what bystanders are compared with."""
    gaps = []
    for idx in range(int((end_s - begin_s) / window_s)):
        at_s = begin_s + idx * window_s
        gaps += [s.longest_gap_s(at_s, at_s + window_s) for s in streams if s.runs_at(at_s)]
    return gaps


HEAD = (
    *("losses", "", "concerned", "ended in error", "refused", "tokens wrong", "pause p50", "p99", "max"),
    *("others' gap p99", "max", "new: first token max", "whole again p50", "max", "never", "not measured"),
)


def table(lines: Sequence[Line], undisturbed_s: Sequence[float]) -> str:
    """Markdown; times in seconds."""
    rows = [HEAD, ["---"] * len(HEAD)]
    calm = ["undisturbed", "", *[""] * 7, *_times(undisturbed_s, 99, 100), *[""] * 5]
    for line in lines:
        counts = [line.num_concerned, line.num_lost, line.num_refused, line.num_wrong]
        row = [line.kind, str(line.num_losses), *map(str, counts), *_times(line.pauses_s, 50, 99, 100)]
        row += [*_times(line.gaps_s, 99, 100), *_times(line.first_s, 100), *_times(line.whole_s, 50, 100)]
        rows.append([*row, str(line.num_unhealed), str(line.num_unmeasured)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [*rows, calm])


def _times(values_s: Sequence[float], *percents: float) -> list[str]:
    ordered = sorted(values_s)
    return [f"{percentile(ordered, percent):.2f}" if ordered else "-" for percent in percents]

"""Pure parts: do two engines say the same, spreads of speeds and of their ratios, rows and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Tokens = Sequence[Sequence[int]]


def equal_share(ours: Tokens, theirs: Tokens) -> float:
    """Share of output tokens that are equal, position by position. ValueError when there are not equally many."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row(sequences: int, speeds: Mapping[str, Sequence[float]], ours: Sequence[str]) -> dict[str, Any]:
    """The table row of one batch size.  speeds: output tokens/s of every contestant, a value a round.

    ratios[a][b]: of a, one of ours, over b, any other, round by round: what both met in the same minute.
    """
    ratios = {a: {b: _ratio(speeds[a], speeds[b]) for b in speeds if b != a} for a in ours}
    tokens_per_s = {name: spread(values) for name, values in speeds.items()}
    return {"sequences": sequences, "tokens_per_s": tokens_per_s, "ratios": ratios}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each batch size and contestant; a column for the ratio of each of ours over it."""
    ours = list(rows[0]["ratios"])
    names = list(rows[0]["tokens_per_s"])
    width = max(12, *map(len, names))
    headings = "".join(f"  {name + ' / it':>20}" for name in ours)
    lines = [f"{'seqs':>5} {'':{width}} {'tok/s':>8} {'min':>8} {'max':>8}{headings}"]
    for line in rows:
        for name in names:
            of = line["tokens_per_s"][name]
            cells = [_cell(line["ratios"][a].get(name)) for a in ours]
            lines.append(
                f"{line['sequences']:>5} {name:{width}} {of['median']:8.1f} {of['min']:8.1f} {of['max']:8.1f}"
                + "".join(f"  {cell:>20}" for cell in cells)
            )
    return "\n".join(lines)


def _cell(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "-"

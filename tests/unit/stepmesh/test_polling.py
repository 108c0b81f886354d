"""How long a wait polls: frames that arrive in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stepmesh import polling


class Channel:
    sign = 7  # a descriptor


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ReadyFor:
    """Stands for the compiled helper: news after 20 us, `count` times; then none for as long as it is asked."""

    def __init__(self, clock: Clock, count: int) -> None:
        self._clock = clock
        self._left = count

    def await_any(self, _: tuple[object, ...], seconds: float) -> bool:
        self._left -= 1
        self._clock.now += min(20e-6, seconds) if self._left >= 0 else seconds
        return self._left >= 0 and seconds > 20e-6


def spinner(monkeypatch: pytest.MonkeyPatch, clock: Clock, pieces: int) -> polling.Spinner:
    monkeypatch.setattr(polling, "native", ReadyFor(clock, pieces))
    result = polling.Spinner(30e-6, clock)
    channels: list[Any] = [Channel()]
    result.watch(channels)
    return result


def polls(found_at: int) -> Iterator[bool]:
    yield from (False for _ in range(found_at))
    while True:
        yield True


@pytest.mark.parametrize("pieces", [0, 1, 10])
def test_pieces_of_a_frame_keep_it_polling(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    clock = Clock()
    outcomes = polls(pieces)
    assert spinner(monkeypatch, clock, pieces + 1).spin(30e-6, clock.now + 1.0, lambda: next(outcomes))
    assert clock.now == pytest.approx(100.0 + (pieces + 1) * 20e-6)


def test_a_frame_that_stops_coming_is_waited_for_no_longer_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert not spinner(monkeypatch, clock, 3).spin(30e-6, clock.now + 1.0, lambda: False)
    assert clock.now == pytest.approx(100.0 + 3 * 20e-6 + 30e-6)


def test_the_deadline_holds_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert not spinner(monkeypatch, clock, 1000).spin(30e-6, clock.now + 1e-3, lambda: False)
    assert clock.now <= 100.0 + 1e-3 + 1e-9

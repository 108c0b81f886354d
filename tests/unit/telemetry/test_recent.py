"""Sums over a recent window, on a clock of the test's own."""

from __future__ import annotations

from afd.telemetry.recent import RecentSums


class Scene:
    """Two sums and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sums = {"wait": 50.0, "steps": 10.0}
        self.recent = RecentSums(lambda: dict(self.sums), lambda: self.now, window_s=10.0)

    def later(self, seconds: float, wait: float, steps: float = 0.0) -> None:
        self.now += seconds
        self.sums["wait"] += wait
        self.sums["steps"] += steps


def test_only_what_was_added_counts() -> None:
    scene = Scene()
    scene.later(4.0, wait=1.0, steps=2.0)
    growth = scene.recent.look()
    assert growth.seconds == 4.0 and growth.rate("wait") == 0.25 and growth.ratio("wait", "steps") == 0.5


def test_nothing_yet_is_zero_and_not_a_division() -> None:
    growth = Scene().recent.look()
    assert (growth.seconds, growth.rate("wait"), growth.ratio("wait", "steps"), growth.of("?")) == (0.0, 0.0, 0.0, 0.0)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    scene = Scene()
    for _ in range(20):
        scene.later(1.0, wait=1.0)
        scene.recent.look()
    for _ in range(11):
        scene.later(1.0, wait=0.1)
        growth = scene.recent.look()
    assert 10.0 <= growth.seconds <= 11.0
    assert abs(growth.rate("wait") - 0.1) < 1e-9


def test_two_readers_do_not_shorten_each_others_window() -> None:
    scene = Scene()
    for _ in range(400):
        scene.later(0.1, wait=0.05)
        scene.recent.look()
        growth = scene.recent.look()
    assert 10.0 <= growth.seconds <= 10.7 and abs(growth.rate("wait") - 0.5) < 1e-9


def test_a_name_that_appears_later_starts_at_zero() -> None:
    scene = Scene()
    scene.later(1.0, wait=0.0)
    scene.sums["late/1"] = 3.0
    assert scene.recent.look().of("late/1") == 3.0

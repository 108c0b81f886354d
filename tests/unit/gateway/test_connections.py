"""Who has a place, and who loses it."""

from __future__ import annotations

from afd.gateway.connections import PATIENCE_S, Connections


class Open:
    """A connection that closes when it is told to."""

    def __init__(self, connections: Connections):
        self.evicted = False
        self._connections = connections
        connections.opened(self)

    def evict(self) -> None:
        self.evicted = True
        self._connections.closed(self)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_one_that_has_waited_longest_goes_and_never_one_that_is_served() -> None:
    clock = Clock()
    connections = Connections(3, clock)
    first, second, third = (Open(connections) for _ in range(3))
    connections.served(first)
    clock.now_s = 1.0
    connections.waits(second)
    assert not connections.has_room(0) and connections.make_room() is None
    assert [each.evicted for each in (first, second, third)] == [False, False, True]
    assert connections.has_room(0) and not connections.has_room(1)
    connections.served(second)
    clock.now_s = 9.0
    assert connections.make_room() is None and len(connections) == 2


def test_a_newcomer_is_safe_for_a_while_and_others_wait_that_long() -> None:
    clock = Clock()
    connections = Connections(1, clock)
    only = Open(connections)
    clock.now_s = PATIENCE_S / 4
    assert connections.make_room() == PATIENCE_S * 3 / 4
    clock.now_s = PATIENCE_S
    assert connections.make_room() is None
    assert only.evicted


def test_those_who_found_no_room_hear_of_it_once() -> None:
    calls: list[int] = []
    connections = Connections(2, Clock())
    connections.on_room = lambda: calls.append(len(connections))
    first, second = Open(connections), Open(connections)
    connections.served(first)
    connections.waits(first)
    assert calls == []
    assert not connections.has_room(0)
    connections.closed(second)
    connections.closed(first)
    assert calls == [1]
    third = Open(connections)
    connections.served(third)
    assert not connections.has_room(1)
    connections.waits(third)  # now there is somebody to evict
    assert calls == [1, 1]

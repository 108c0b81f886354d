"""One stream of a pair in shared memory, lent to native code that exchanges by itself (`lane.h`).

`stepmesh.lanes` has the calls that give a lane, and `book`, which is told what was done on it. Between the two the main
thread asks the mesh for nothing. Native code takes only frames that are in every respect what comes next; at any other
it stops, and the mesh's next `progress` finds and judges that one where it was posted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_char, c_int64, c_uint64, c_void_p
from typing import NamedTuple, Protocol

from stepmesh.layout import NUM_PARITIES
from stepmesh.types import Header, RankId
from stepmesh.wire import HEADER, HeaderRules

BEFORE_FIRST = 0xFFFF
"""Layer of what a step begins behind: layers are counted in 16 bits, and the next one is 0."""


class SmRules(ctypes.Structure):
    """SmRules of frame.h: `HeaderRules`, as 64-bit numbers."""

    _fields_ = tuple((name, c_uint64) for name in HeaderRules._fields)


class SmLane(ctypes.Structure):
    """SmLane of lane.h."""

    _fields_ = (
        ("out", c_void_p),
        ("in_", c_void_p),
        ("out_slots", c_void_p * NUM_PARITIES),
        ("in_slots", c_void_p * NUM_PARITIES),
        ("out_slot_bytes", c_uint64),
        ("in_slot_bytes", c_uint64),
        ("rules", SmRules),
        ("stream", c_uint64),
        ("bell_fd", c_int64),
        ("own_bell_fd", c_int64),
        ("wakeups_fd", c_int64),
    )


class AddressedBoard(Protocol):
    """A board of the compiled half."""

    def address(self) -> int:
        """Address of its SmBoard (frame.h), which lives as long as the board."""


class LaneMemory(NamedTuple):
    """What a channel lends: both boards, the slots by parity, the peer's bell; this rank's own bell, and a descriptor
    that is readable when anything at all wants this rank.
    """

    out_board: AddressedBoard
    in_board: AddressedBoard
    outgoing: Sequence[memoryview]
    incoming: Sequence[memoryview]
    bell_fd: int
    own_bell_fd: int
    wakeups_fd: int


class Trips(NamedTuple):
    """Exchanges on a lane, in order. Seconds; points in time are the rank's monotonic clock's.

    num_sent, num_answered: the last one alone may still be awaited (attention).
    waited_s: for answers, in all.
    last_s: when the last one began.
    times: (begun, answered) of each, for traces; attention: posted and taken, None if it is awaited; FFN: taken and
    posted.
    """

    num_sent: int
    num_answered: int
    waited_s: float
    last_s: float
    times: Callable[[], Iterable[tuple[float, float | None]]]


class Lane:
    """A stream of the pair with `peer`. last: of the dispatch that was answered last, of which the next ones differ in
    seq and layer only; before a step with layer BEFORE_FIRST, and on the FFN side with the former step's number and
    rows. Good until the pair is down.
    """

    def __init__(self, peer: RankId, stream: int, memory: LaneMemory, rules: HeaderRules) -> None:
        self.peer = peer
        self.stream = stream
        self.last: Header | None = None
        self._memory = memory  # keeps mappings and boards
        self._struct = SmLane(
            memory.out_board.address(),
            memory.in_board.address(),
            _addresses(memory.outgoing),
            _addresses(memory.incoming),
            memory.outgoing[0].nbytes,
            memory.incoming[0].nbytes,
            SmRules(*map(int, rules)),
            stream,
            memory.bell_fd,
            memory.own_bell_fd,
            memory.wakeups_fd,
        )
        self._packed = (c_char * HEADER.size)()
        self.address = ctypes.addressof(self._struct)
        self.last_address = ctypes.addressof(self._packed)  # SmHeader of frame.h

    def follow(self, last: Header) -> None:
        """Let native code go on from this dispatch."""
        self.last = last
        HEADER.pack_into(self._packed, 0, *last)

    def newest(self) -> Header:
        """Header of the dispatch with which native code has ended: the newest that it sent or answered, else `last`."""
        return Header._make(HEADER.unpack(self._packed))


def _addresses(slots: Sequence[memoryview]) -> ctypes.Array[c_void_p]:
    return (c_void_p * NUM_PARITIES)(*(ctypes.addressof(c_char.from_buffer(slot)) for slot in slots))

"""Our own account of a send queue: how many work requests it may still hold, and which one has to be signalled. Pure.

A device gives the entries of unsignalled requests back only when it reports a later signalled one (Soft-RoCE gives them
back earlier, and would forgive an overrun). So every entry counts as taken until the completion that covers it has been
polled, and one request in so many is signalled.
"""

from __future__ import annotations


class SendLedger:
    """Entries of one send queue of `depth` requests, of which a frame takes up to `per_frame`."""

    def __init__(self, depth: int, per_frame: int) -> None:
        # With a signal at least twice per round of the queue, a full queue always has one under way.
        self._signal_every = max(1, depth // 4)
        assert depth >= 2 * per_frame and self._signal_every + per_frame <= depth
        self._depth = depth
        self.taken = 0
        self._unsignalled = 0

    def has_room(self, num_requests: int) -> bool:
        """False: poll completions first."""
        return self.taken + num_requests <= self._depth

    def post(self, num_requests: int) -> int:
        """Take entries. 0: leave the last request unsignalled; n: signal it, its completion gives n entries back."""
        self.taken += num_requests
        self._unsignalled += num_requests
        if self._unsignalled < self._signal_every:
            return 0
        covered, self._unsignalled = self._unsignalled, 0
        return covered

    def completed(self, covered: int) -> None:
        """A signalled request is over, and all before it."""
        self.taken -= covered

    def post_alone(self) -> int:
        """Take one entry for a request that is signalled in any case; as `post` otherwise."""
        self.taken += 1
        covered, self._unsignalled = self._unsignalled + 1, 0
        return covered

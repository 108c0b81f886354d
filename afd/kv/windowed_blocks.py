"""Blocks of sliding-window layers: a sequence holds those that its next token can see, older ones go back. Pure.

All layers of a model name a token's block by the same index in the sequence. For windowed layers those blocks come from
a pool of their own, and the ones behind the window are dropped at commit, so that a long context costs such layers no
more than its window. A cached prefix is of use only as far as the blocks of its last window are cached here too.
"""

from __future__ import annotations

from collections.abc import Sequence

from afd.kv.block_pool import BlockPool

DROPPED = -1
"""Stands in place of a block that no token can see any more."""


class WindowedBlocks:
    """window: of the widest windowed layer, the token itself included.
    max_step_tokens: the largest chunk.
    """

    def __init__(self, pool: BlockPool, window: int, max_step_tokens: int):
        self.pool = pool
        self._window = window
        self._most_held = held_at_most(window, max_step_tokens, pool.block_size)

    def first_seen(self, num_computed: int) -> int:
        """Index of the first block that the token at position `num_computed` can see."""
        return max(0, num_computed - self._window + 1) // self.pool.block_size

    def usable(self, hashes: Sequence[bytes]) -> int:
        """How many blocks of a cached prefix can be used: the most whose last window is cached here."""
        size = self.pool.block_size
        first_missing = [0]  # [i]: the first block of the run of cached ones that ends before block i
        for idx, content_hash in enumerate(hashes):
            first_missing.append(first_missing[-1] if self.pool.is_cached(content_hash) else idx + 1)
        for count in range(len(hashes), 0, -1):
            if first_missing[count] <= self.first_seen(count * size):
                return count
        return 0

    def take(self, hashes: Sequence[bytes]) -> list[int]:
        """A sequence's blocks for a usable prefix, with references on those of its last window."""
        first = self.first_seen(len(hashes) * self.pool.block_size)
        return [DROPPED] * first + self.pool.take(hashes[first:])

    def missing(self, held: Sequence[int], num_tokens: int) -> int:
        """Blocks to allocate before the first `num_tokens` tokens are all computed, if that is the next step."""
        return max(0, self.pool.blocks_for(num_tokens) - len(held))

    def missing_over_time(self, held: Sequence[int], num_tokens: int) -> int:
        """Most blocks to allocate at any time until then, however many steps it takes."""
        return min(self.missing(held, num_tokens), self._most_held)

    def trim(self, held: list[int], num_computed: int) -> None:
        """Drop the blocks that the token at position `num_computed` and later ones cannot see."""
        first = self.first_seen(num_computed)
        gone = []
        for idx in range(min(first, len(held)) - 1, -1, -1):
            if held[idx] == DROPPED:
                break
            gone.append(held[idx])
            held[idx] = DROPPED
        self.pool.release(gone)

    def release(self, held: Sequence[int]) -> None:
        """Give everything back."""
        self.pool.release(kept(held))


def kept(held: Sequence[int]) -> list[int]:
    """The blocks of these that are not dropped."""
    return [block for block in held if block != DROPPED]


def held_at_most(window: int, max_step_tokens: int, block_size: int) -> int:
    """Blocks that one sequence can hold during a step: its window, its chunk, and a broken block at either end."""
    return -(-(window + max_step_tokens) // block_size) + 1

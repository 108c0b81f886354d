"""Reference-counted KV blocks with prefix caching. Pure: lists and dicts, no tensor, no clock.

A block is in exactly one of two places: held (reference count >= 1) or free (count 0). A free block may still be
*cached*: its content is known by hash and a later request with the same prefix takes it back. Blocks without content
are handed out first; of the cached ones, least recently released first, and only then is a content forgotten. What
the pool itself needs grows with the blocks that were ever handed out, not with their number.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT_HASH = b"\0" * 16


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block's tokens after the prefix `parent` (16 bytes, collision resistant)."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Allocates block indices 0..num_blocks-1.

    Blocks enter the prefix table only through `publish`, which the scheduler calls at commit: content that
    is still being computed is never shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_size {block_size} must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._ref: list[int] = []  # of the blocks that were ever handed out: 0..len-1
        self._empty: list[int] = []  # of those, free ones without content; last in, first out
        self._cached: OrderedDict[int, None] = OrderedDict()  # of those, free ones with content, oldest first
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + self.num_blocks - len(self._ref) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def find(self, token_ids: Sequence[int], known: list[bytes]) -> list[bytes]:
        """Hashes of the longest cached prefix of `token_ids` in full blocks; no reference is taken.

        At least one token is left to compute, since logits come from computing one. known: see `hash_of`.
        """
        if not self.prefix_cache:
            return []
        num_blocks = max(0, len(token_ids) - 1) // self.block_size
        for idx in range(num_blocks):
            if self.hash_of(token_ids, idx, known) not in self._block_of_hash:
                return known[:idx]
        return known[:num_blocks]

    def hash_of(self, token_ids: Sequence[int], idx: int, known: list[bytes]) -> bytes:
        """Prefix-chain hash of full block `idx` of a text.

        known: the hashes of its leading blocks, at least those before `idx`. A new one is added there, so that each
        block of a text that only grows is hashed once.
        """
        if idx == len(known):
            start = idx * self.block_size
            known.append(chain_hash(known[-1] if known else ROOT_HASH, token_ids[start : start + self.block_size]))
        return known[idx]

    def is_cached(self, content_hash: bytes) -> bool:
        """True when `take` of this hash would succeed."""
        return content_hash in self._block_of_hash

    def take(self, hashes: Sequence[bytes]) -> list[int]:
        """Take a reference on the block of each cached hash."""
        blocks = [self._block_of_hash[content_hash] for content_hash in hashes]
        for block in blocks:
            if self._ref[block] == 0:
                del self._cached[block]
            self._ref[block] += 1
        return blocks

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each, or None (and nothing taken) when there are too few."""
        if num_blocks > self.num_free:
            return None
        return [self._allocate() for _ in range(num_blocks)]

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference back on each. The tail of a sequence is freed first, so prefixes live longest."""
        for block in reversed(blocks):
            self._ref[block] -= 1
            assert self._ref[block] >= 0, f"block {block} released more often than taken"
            if self._ref[block] == 0:
                if block in self._hash_of_block:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def publish(self, block: int, content_hash: bytes) -> None:
        """Make a held, fully computed block findable by its prefix hash. The first block of a hash stays."""
        assert self._ref[block] > 0, f"block {block} published while free"
        if self.prefix_cache and content_hash not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[content_hash] = block
            self._hash_of_block[block] = content_hash

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless the reference counts are those of the holders' lists, and all else is free."""
        count = [0] * len(self._ref)
        for blocks in held:
            for block in blocks:
                count[block] += 1
        assert count == self._ref, "reference counts differ from the holders' block lists"
        free = [*self._empty, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert {b for b, c in enumerate(count) if c == 0} == set(free), "free list is wrong"
        assert set(self._cached) <= set(self._hash_of_block), "a block without content is kept as cached"
        assert {b: h for h, b in self._block_of_hash.items()} == self._hash_of_block, "prefix table is torn"

    def _allocate(self) -> int:
        """One free block, with one reference; there is one."""
        if self._empty:
            block = self._empty.pop()
        elif len(self._ref) < self.num_blocks:
            self._ref.append(1)
            return len(self._ref) - 1
        else:
            block, _none = self._cached.popitem(last=False)
            del self._block_of_hash[self._hash_of_block.pop(block)]
        self._ref[block] = 1
        return block

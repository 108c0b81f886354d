"""Blocks of sliding-window layers: what is held, what a cached prefix is good for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.kv.block_pool import BlockPool
from afd.kv.windowed_blocks import DROPPED, WindowedBlocks, held_at_most, kept

SIZE = 4


def make(window, num_blocks=32, max_step_tokens=8):
    return WindowedBlocks(BlockPool(num_blocks, SIZE), window, max_step_tokens)


def test_blocks_behind_the_window_go_back():
    windowed = make(window=5)
    held = windowed.pool.allocate(4)
    first, second, *rest = held
    windowed.trim(held, 7)  # position 7 sees 3..7: block 0 holds 3
    assert held == [first, second, *rest]
    windowed.trim(held, 8)  # sees 4..8
    assert held == [DROPPED, second, *rest]
    windowed.trim(held, 12)
    assert held == [DROPPED, DROPPED, *rest]
    windowed.pool.check([rest])
    windowed.release(held)
    windowed.pool.check([])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(window=st.integers(1, 20), chunks=st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_every_token_finds_its_window_and_no_more_is_held_than_told(window, chunks):
    windowed = make(window)
    held, computed = [], 0
    for chunk in chunks:
        held.extend(windowed.pool.allocate(windowed.missing(held, computed + chunk)))
        assert len(kept(held)) <= held_at_most(window, 8, SIZE)
        for position in range(computed, computed + chunk):
            for seen in range(max(0, position - window + 1), position + 1):
                assert held[seen // SIZE] != DROPPED
        computed += chunk
        windowed.trim(held, computed)
    windowed.pool.check([kept(held)])


@pytest.mark.parametrize(
    ("window", "cached", "count"),
    [
        (5, "111111", 6),
        (5, "001111", 6),  # position 24 sees 20..24, so the blocks before are not needed
        (5, "111101", 6),
        (6, "111101", 4),  # position 24 sees 19..24: the last block alone does not reach back to 19
        (4, "111101", 6),  # position 24 sees 21..24
        (9, "011110", 5),
        (9, "101010", 1),
        (50, "011111", 0),
        (5, "000000", 0),
        (1, "000000", 6),  # a token that sees itself only
    ],
)
def test_a_prefix_is_usable_as_far_as_its_last_window_is_cached(window, cached, count):
    windowed = make(window)
    hashes = [bytes([i]) * 16 for i in range(len(cached))]
    blocks = windowed.pool.allocate(len(cached))
    for flag, block, content_hash in zip(cached, blocks, hashes, strict=True):
        if flag == "1":
            windowed.pool.publish(block, content_hash)
    windowed.pool.release(blocks)
    assert windowed.usable(hashes) == count
    held = windowed.take(hashes[:count])
    first = windowed.first_seen(count * SIZE)
    assert held == [DROPPED] * min(first, count) + blocks[first:count]
    windowed.pool.check([kept(held)])

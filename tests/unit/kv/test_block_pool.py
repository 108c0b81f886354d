"""Block pool: allocation, reference counts, prefix table."""

from hypothesis import given, settings
from hypothesis import strategies as st

from afd.kv.block_pool import ROOT_HASH, BlockPool, chain_hash


def publish_all(pool, blocks, tokens):
    parent = ROOT_HASH
    for idx in range(len(tokens) // pool.block_size):
        parent = chain_hash(parent, tokens[idx * pool.block_size : (idx + 1) * pool.block_size])
        pool.publish(blocks[idx], parent)


def test_allocate_is_all_or_nothing():
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    taken = pool.allocate(4)
    assert sorted(taken) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    pool.release(taken)
    pool.check([])


def test_prefix_is_found_only_after_publish_and_leaves_one_token():
    pool = BlockPool(8, 4)
    tokens = list(range(8))
    blocks = pool.allocate(2)
    assert pool.find(tokens, []) == []
    publish_all(pool, blocks, tokens)
    hashes = pool.find(tokens, [])
    assert len(hashes) == 1
    shared = pool.take(hashes)
    assert shared == blocks[:1], "the last token must be computed, so its block is not taken"
    longer = pool.take(pool.find([*tokens, 9], []))
    assert longer == blocks
    pool.check([blocks, shared, longer])


def test_different_prefix_with_equal_block_content_is_not_shared():
    pool = BlockPool(8, 2)
    blocks = pool.allocate(2)
    publish_all(pool, blocks, [1, 2, 3, 4])
    assert pool.find([9, 9, 3, 4, 5], []) == []


def test_cached_content_survives_release_until_the_block_is_needed():
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    publish_all(pool, blocks, [1, 2])
    pool.release(blocks)
    assert pool.allocate(1) != blocks, "uncached blocks go first"
    again = pool.take(pool.find([1, 2, 3], []))
    assert again == blocks
    pool.release(again)
    assert pool.allocate(1) == blocks
    assert pool.find([1, 2, 3], []) == []


def test_prefix_cache_off_never_shares():
    pool = BlockPool(4, 2, prefix_cache=False)
    blocks = pool.allocate(1)
    publish_all(pool, blocks, [1, 2])
    assert pool.find([1, 2, 3], []) == []


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(0, 2)), max_size=40))
def test_any_sequence_of_operations_keeps_the_books(operations):
    """Requests over a small alphabet of prefixes come and go; references always match the holders."""
    pool = BlockPool(10, 2)
    held: list[list[int]] = []
    for kind, length, family in operations:
        if kind < 3:
            tokens = [family] * length
            blocks = pool.take(pool.find(tokens, []))
            more = pool.allocate(pool.blocks_for(length) - len(blocks))
            if more is None:
                pool.release(blocks)
            else:
                publish_all(pool, blocks + more, tokens)
                held.append(blocks + more)
        elif held:
            pool.release(held.pop(length % len(held)))
        pool.check(held)

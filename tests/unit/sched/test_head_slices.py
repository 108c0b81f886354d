"""How heads are cut, and whose turn it is."""

import itertools

import pytest

from afd.sched.head_slices import NextStage, next_of, slice_end


@pytest.mark.parametrize(("vocab", "rows"), [(1, 1), (100, 64), (128, 64), (49152, 4096)])
def test_slices_cover_the_vocabulary_once(vocab, rows):
    ends, done = [], 0
    while done < vocab:
        end = slice_end(done, vocab, alone=False, rows=rows)
        assert done < end <= min(done + rows, vocab)
        ends.append(end)
        done = end
    assert len(ends) == -(-vocab // rows)
    assert slice_end(0, vocab, alone=True, rows=rows) == vocab


def test_the_longest_ready_runs_but_no_head_begins_while_another_goes_on():
    for count in (1, 2, 3, 4):
        for ready in itertools.product(NextStage, repeat=count):
            if ready.count(NextStage.HEAD_GOES_ON) > 1:
                continue  # cannot be: that is the rule
            place = next_of(ready)
            if NextStage.HEAD_GOES_ON in ready:
                assert ready[place] is not NextStage.HEAD_BEGINS
                assert all(passed is NextStage.HEAD_BEGINS for passed in ready[:place])
            else:
                assert place == 0

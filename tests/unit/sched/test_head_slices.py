"""How heads are cut, and whose turn it is."""

import itertools

import pytest

from afd.sched.head_slices import MIN_SLICE_ROWS, SLICE_LOGITS, SLICE_MULTIPLE, NextStage, next_of, slice_end


@pytest.mark.parametrize("vocab", [1, MIN_SLICE_ROWS, MIN_SLICE_ROWS + 1, 49152, 128815])
@pytest.mark.parametrize("num_seqs", [0, 1, 7, 64, 1000])
def test_slices_cover_the_vocabulary_once(vocab, num_seqs):
    ends, done = [], 0
    while done < vocab:
        end = slice_end(done, vocab, num_seqs, alone=False)
        assert done < end <= vocab
        if end < vocab:
            assert (end - done) % SLICE_MULTIPLE == 0 and end - done >= MIN_SLICE_ROWS
            assert (end - done) * num_seqs <= max(SLICE_LOGITS, MIN_SLICE_ROWS * num_seqs)
        ends.append(end)
        done = end
    assert len(ends) == -(-vocab // ends[0])
    assert slice_end(0, vocab, num_seqs, alone=True) == vocab


def test_slices_of_more_rows_are_narrower():
    ends = [slice_end(0, 49152, num_seqs, alone=False) for num_seqs in (1, 8, 64, 192)]
    assert ends == [49152, 6144, 768, 512]


def test_layers_come_first_and_no_head_begins_while_another_goes_on():
    for count in (1, 2, 3, 4):
        for ready in itertools.product(NextStage, repeat=count):
            place = next_of(ready)
            order = [NextStage.LAYER, NextStage.HEAD_GOES_ON, NextStage.HEAD_BEGINS]
            wanted = next(stage for stage in order if stage in ready)
            assert place == ready.index(wanted), "the longest ready of the most urgent ones"

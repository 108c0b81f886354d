"""bench/compare: the gate's share, spreads, ratios round by round, the table."""

import pytest

from bench.compare.report import equal_share, row, spread, table

SPEEDS = {"1A1F:0": [10.0, 30.0, 20.0], "mono": [20.0, 30.0, 10.0], "vllm": [5.0, 10.0, 40.0]}


def test_equal_share_counts_positions():
    assert equal_share([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1.0
    assert equal_share([[1, 2], [3, 4]], [[1, 9], [4, 3]]) == 0.25


@pytest.mark.parametrize("theirs", [[[1, 2]], [[1, 2], [3]]])
def test_fewer_tokens_are_an_error_not_a_lower_share(theirs):
    with pytest.raises(ValueError):
        equal_share([[1, 2], [3, 4]], theirs)


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_ratios_are_of_the_same_round():
    result = row(8, SPEEDS, ["1A1F:0", "mono"])
    assert result["sequences"] == 8
    assert result["tokens_per_s"]["vllm"] == {"median": 10.0, "min": 5.0, "max": 40.0}
    assert result["ratios"]["1A1F:0"]["vllm"] == {"median": 2.0, "min": 0.5, "max": 3.0}
    assert result["ratios"]["mono"]["1A1F:0"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert set(result["ratios"]) == {"1A1F:0", "mono"}
    assert set(result["ratios"]["mono"]) == {"1A1F:0", "vllm"}


def test_rounds_that_one_did_not_run_are_an_error():
    with pytest.raises(ValueError):
        row(8, {"mono": [1.0, 2.0], "vllm": [1.0]}, ["mono"])


def test_table_has_a_line_for_each_batch_and_contestant():
    lines = table([row(n, SPEEDS, ["1A1F:0", "mono"]) for n in (1, 64)]).splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[0].split() == ["seqs", "tok/s", "min", "max", "1A1F:0", "/", "it", "mono", "/", "it"]
    assert lines[1].split() == ["1", "1A1F:0", "20.0", "10.0", "30.0", "-", "1.00", "(0.50", "to", "2.00)"]
    assert lines[-1].split()[:5] == ["64", "vllm", "10.0", "5.0", "40.0"]
    assert "2.00 (0.50 to 3.00)" in lines[-1]

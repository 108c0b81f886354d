"""bench/compare: the gate refuses another model, rounds are interleaved, peers are named with their dtype."""

import sys

import pytest

from bench.compare.__main__ import gate, parse_arguments, rounds
from bench.compare.contestant import Outcome
from bench.drawing import GREEDY, Drawing


class Scripted:
    """Answers `token` for every token, and a speed that counts its rounds."""

    pid = 0

    def __init__(self, name, token=7, calls=None):
        self.name, self.token, self.calls = name, token, [] if calls is None else calls

    def run_round(self, prompts, output_len, drawing=GREEDY):
        self.calls.append(self.name if drawing == GREEDY else f"{self.name} drawn")
        return Outcome(float(len(self.calls)), [[self.token] * output_len for _ in prompts])


def test_the_gate_lets_equal_ones_pass_and_stops_at_another_model(capsys):
    assert gate([Scripted("mono"), Scripted("vllm")], [[1], [2]]) == {"mono": 1.0, "vllm": 1.0}
    assert "gate vllm: 100% of the greedy tokens equal mono's" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="vllm does not run the same model as mono"):
        gate([Scripted("mono"), Scripted("vllm", token=8)], [[1], [2]])


def test_rounds_are_interleaved():
    calls = []
    contestants = [Scripted("mono", calls=calls), Scripted("vllm", calls=calls)]
    speeds = rounds(contestants, [[1]], 4, 2, Drawing(0.8, 0.95))
    assert calls == ["mono drawn", "vllm drawn"] * 2
    assert speeds == {"mono": [1.0, 3.0], "vllm": [2.0, 4.0]}


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compare", *flags])
    return parse_arguments()


def test_a_peer_may_have_a_dtype_of_its_own(tmp_path, monkeypatch):
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    args = parsed(monkeypatch, "--environments", str(tmp_path), "--peers", "vllm,vllm:float32", "--sequences", "1,8")
    assert args.peers == ["vllm", "vllm:float32"]
    assert args.sequences == [1, 8]


def test_a_peer_that_does_not_draw_is_refused_where_tokens_are_drawn(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--environments", str(tmp_path), "--peers", "llama_cpp", "--temperature", "0.8")
    assert "llama_cpp: greedy only" in capsys.readouterr().err


@pytest.mark.parametrize("peers, why", [("sglang", "no such peer: sglang"), ("vllm", "peers/vllm.py says how")])
def test_unknown_peers_and_missing_environments_are_refused(peers, why, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--environments", str(tmp_path), "--peers", peers)
    assert why in capsys.readouterr().err

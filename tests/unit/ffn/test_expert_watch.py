"""Silent experts are reported once, and looked for at intervals."""

from afd.ffn.expert_watch import PERIOD_S, ExpertWatch
from afd.model.expert_load import ExpertLoad


def load(*outputs: float) -> ExpertLoad:
    found = ExpertLoad(10, [0] * len(outputs))
    found.add([2] * len(outputs), [2 * value * value for value in outputs])  # two rows each
    return found


def test_each_silent_expert_is_news_once():
    watch = ExpertWatch()
    assert watch.look({1: load(1.0, 1.0, 1.0)}, 0.0) == []
    damaged = {1: load(1.0, 0.0, 1.0), 3: load(0.0, 2.0, 2.0)}
    assert watch.look(damaged, PERIOD_S / 2) == [], "not yet due"
    assert watch.look(damaged, PERIOD_S) == [(1, 11), (3, 10)]
    assert watch.look(damaged, 2 * PERIOD_S) == []
    assert watch.found == ((1, 11), (3, 10))

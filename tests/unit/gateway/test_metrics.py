"""vLLM's metric names say of the cluster what an endpoint picker and vLLM's dashboards read from them."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from afd.errors import UnavailableError
from afd.gateway.generation import ClientGoneError, Generation
from afd.gateway.metrics import DispatchCollector, GatewayMetrics
from afd.gateway.sequence import Delta
from afd.gateway.sla import SlaWindow
from afd.gateway.worker_client import LinkCounters
from afd.types import FinishReason
from tests.fakes.dispatch_scene import Scene, stats

SCRAPED = {  # what the pickers of GAIE and llm-d look up in a model server's answer
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}


class Board:
    """A scene's metrics page."""

    def __init__(self, scene):
        self.scene = scene
        self.registry = CollectorRegistry()
        sla = SlaWindow(0.05, 1.0)
        self.metrics = GatewayMetrics(self.registry, "m", sla)
        self.registry.register(DispatchCollector(scene.dispatcher, LinkCounters(), "m", sla, block_size=32))

    def samples(self):
        page = generate_latest(self.registry).decode()
        return [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def picked(self, name):
        """The pickers' rule: of a name's series, the one with the latest timestamp; without any, the first."""
        return next(sample for sample in self.samples() if sample.name == name)

    def values(self, name):
        return {frozenset(sample.labels.items()): sample.value for sample in self.samples() if sample.name == name}

    def reasons(self):
        samples = [sample for sample in self.samples() if sample.name == "vllm:request_success_total"]
        return {sample.labels["finished_reason"]: sample.value for sample in samples}


def test_a_picker_sees_the_whole_cluster():
    scene = Scene("abc")
    board = Board(scene)
    scene.say("a", stats(0, num_running=3, num_waiting=1, kv_blocks_free=90), 0.1)
    scene.say("b", stats(1, num_running=4, num_waiting=0, kv_blocks_free=10), 0.1)
    scene.say("c", stats(2, num_running=0, num_waiting=2, kv_blocks_free=50, kv_blocks_total=200), 0.1)
    for worker in scene.dispatcher.workers.values():
        worker.cool(100.0)
    for _ in range(5):
        scene.submit(0.2)
    assert len(scene.dispatcher.queue) == 5
    assert board.picked("vllm:num_requests_waiting").value == 1 + 0 + 2 + 5
    assert board.picked("vllm:num_requests_running").value == 7
    assert board.picked("vllm:kv_cache_usage_perc").value == pytest.approx(1 - 150 / 400)
    sizes = board.picked("vllm:cache_config_info").labels
    assert (int(sizes["block_size"]), int(sizes["num_gpu_blocks"])) == (32, 400)
    for name in SCRAPED:
        assert len(board.values(name)) == 1, name


def test_an_empty_cluster_has_every_figure_but_the_cache():
    scene = Scene("a")
    scene.members.clear()
    scene.publish(0.1)
    board = Board(scene)
    for name in SCRAPED - {"vllm:cache_config_info"}:
        assert board.picked(name).value == 0
    assert board.values("vllm:cache_config_info") == {}


def test_the_status_board_of_vllm():
    """2 - (max(vllm:engine_sleep_state{sleep_state="awake"}) == bool 0): 2 is Up."""
    scene = Scene("a")
    board = Board(scene)
    assert board.picked("vllm:engine_sleep_state").labels["sleep_state"] == "awake"
    assert board.picked("vllm:engine_sleep_state").value == 1
    scene.members.clear()
    scene.publish(0.1)
    assert board.picked("vllm:engine_sleep_state").value == 0


def test_totals_neither_fall_nor_count_twice_when_workers_come_and_go():
    scene = Scene("ab")
    board = Board(scene)
    for name, count in (("a", 100), ("b", 30)):
        rank = scene.members[name].rank
        scene.say(name, stats(rank, prefix_queries=count, prefix_hits=count // 10, num_preemptions=1), 0.1)
    names = {
        "vllm:prefix_cache_queries_total": 130,
        "vllm:prefix_cache_hits_total": 13,
        "vllm:num_preemptions_total": 2,
    }
    assert {name: board.picked(name).value for name in names} == names
    gone = scene.members.pop("a")
    scene.publish(0.2)
    assert {name: board.picked(name).value for name in names} == names
    scene.members["a"] = gone
    scene.publish(0.3)
    scene.say("a", stats(0, prefix_queries=105, prefix_hits=10, num_preemptions=1), 0.4)
    assert board.picked("vllm:prefix_cache_queries_total").value == 135


def running(board, count):
    generation = Generation(board.metrics, lambda generation: None)
    for _ in range(count):
        sequence = board.scene.submit()
        generation.add(sequence)
    return generation


@pytest.mark.parametrize(
    ("failure", "reason"), [(ClientGoneError("gone"), "abort"), (UnavailableError("late", code="timeout"), "error")]
)
def test_every_sequence_ends_with_a_reason(failure, reason):
    board = Board(Scene("a"))
    generation = running(board, 3)
    first = generation.sequences[0]
    generation.push(first, Delta(0, "x", [5], finish=FinishReason.STOP), 1.0)
    generation.fail(failure)
    generation.close()
    generation.close()
    assert board.reasons() == {"stop": 1, "length": 0, "abort": 0, "error": 0} | {reason: 2}


def test_prompt_tokens_count_when_they_have_been_computed():
    board = Board(Scene("a"))
    generation = running(board, 2)
    for sequence in generation.sequences:
        board.metrics.submitted(sequence)
    assert board.picked("vllm:prompt_tokens_total").value == 0
    first, second = generation.sequences
    generation.push(first, Delta(0, "x", [5]), 1.0)
    generation.push(first, Delta(0, "x", [5]), 1.1)
    assert board.picked("vllm:prompt_tokens_total").value == len(first.prompt_ids)
    generation.fail(ClientGoneError("gone"))
    generation.close()
    assert board.picked("vllm:prompt_tokens_total").value == len(first.prompt_ids)
    assert second.prompt_ids

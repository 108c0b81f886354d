"""From a gateway's message to a sequence, and how the head is cut: what the worker and the simulator do alike."""

from __future__ import annotations

from afd.kv.block_pool import BlockPool
from afd.messages.serving import Refused, Submit
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.submission import admit
from afd.types import SamplingParams


def admission(num_blocks: int, *running: Submit) -> Admission:
    """Beside a scheduler that has `running` already: an idle one takes whatever comes."""
    scheduler = Scheduler(SchedulerConfig(max_context=256, num_streams=1), BlockPool(num_blocks, 4))
    judge = Admission(scheduler, LatencyModel(), policy="enforce", tpot_s=0.05, ttft_s=5.0)
    for idx, message in enumerate(running):
        seq = admit(message, judge, owner=b"", arrival=idx, now=0.0)
        assert not isinstance(seq, Refused)
        scheduler.add(seq)
    return judge


def asked(req_id: str, num_prompt: int, num_output: int) -> Submit:
    return Submit(req_id, 1, [1] * num_prompt, [], SamplingParams(max_tokens=num_output, seed=0))


def test_a_moved_request_comes_with_its_output_and_its_target():
    message = Submit("r", 2, [1, 2, 3], [7, 8], SamplingParams(max_tokens=9, seed=0), priority=4, tpot_s=0.02)
    seq = admit(message, admission(64), owner=b"gw", arrival=11, now=5.0)
    assert not isinstance(seq, Refused)
    assert (seq.req_id, seq.attempt, seq.owner, seq.priority, seq.arrival) == ("r", 2, b"gw", 4, 11)
    assert seq.tokens == [1, 2, 3, 7, 8] and seq.num_prompt == 3 and seq.num_output == 2
    assert seq.tpot_s == 0.02


def test_the_clusters_target_holds_for_who_names_none():
    seq = admit(asked("r", 1, 1), admission(64), owner=b"", arrival=1, now=0.0)
    assert not isinstance(seq, Refused) and seq.tpot_s == 0.05


def test_admissions_refusal_goes_back_as_want_of_capacity():
    answer = admit(asked("r", 8, 8), admission(4, asked("first", 8, 8)), owner=b"", arrival=1, now=0.0)
    assert isinstance(answer, Refused)
    assert (answer.req_id, answer.attempt, answer.reason) == ("r", 1, "capacity")
    assert "KV cache of 4 blocks" in answer.detail and answer.retry_after_s > 0.0

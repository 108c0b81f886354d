"""What a worker makes of a gateway's submission once nothing is wrong with it: a sequence, or a refusal. Pure."""

from __future__ import annotations

from afd.messages.serving import Refused, Submit
from afd.sched.policy import Admission, Ask
from afd.sched.sequence import Sequence


def admit(message: Submit, admission: Admission, *, owner: bytes, arrival: int, now: float) -> Sequence | Refused:
    """The sequence to add to the scheduler, or admission's refusal; call once per submission.

    owner: the gateway.
    arrival: its place in the order of arrivals here.
    now: seconds of the caller's clock.
    """
    refusal = admission.judge(_ask(message), now)
    if refusal is not None:
        return Refused(message.req_id, message.attempt, "capacity", refusal.detail, refusal.retry_after_s)
    return Sequence(
        message.req_id,
        message.attempt,
        owner,
        [*message.prompt_ids, *message.output_ids],
        len(message.prompt_ids),
        message.sampling,
        message.priority,
        arrival,
        tpot_s=admission.target_of(message.tpot_s),
    )


def _ask(message: Submit) -> Ask:
    return Ask(
        message.req_id,
        len(message.prompt_ids),
        message.sampling,
        num_output=len(message.output_ids),
        tpot_s=message.tpot_s,
        first_due_s=max(0.0, message.ttft_deadline_s),
        priority=message.priority,
        resumed=message.attempt > 0,
    )

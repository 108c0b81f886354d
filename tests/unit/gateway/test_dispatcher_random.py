"""The dispatcher in a bad world: messages lost, doubled and late, workers full, silent, replaced. Whatever happens, a
request ends, with exactly its tokens or with an error, and nothing of it is left behind."""

import random

import pytest

from afd.errors import AfdError, UnavailableError
from afd.messages.serving import Abort, Refused, Resend, Submit, TokenChunk, Tokens
from afd.types import FinishReason
from tests.fakes.dispatch_scene import Scene, member, stats

STEP_S = 0.05
NUM_TOKENS = 6


def token(req_id, idx):
    return 100 * int(req_id.removeprefix("r")) + idx


class World:
    """Workers behind a lossy link. One `step` is 50 ms."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.scene = Scene("abc", max_queue=50, recovery_timeout_s=20.0, request_timeout_s=60.0)
        self.runs = {name: {} for name in "abc"}  # worker -> req_id -> (submit, tokens so far)
        self.muted_until = dict.fromkeys("abc", 0.0)
        self.requests = []
        self.now = 0.0
        self.num_workers = 3

    def step(self, *, calm=False):
        self.now += STEP_S
        self.deliver(calm)
        if not calm:
            self.disturb()
        for name in list(self.scene.members):
            if name in self.runs and (calm or self.now >= self.muted_until[name]):
                self.work(name, calm)
        self.scene.dispatcher.tick(self.now)

    def deliver(self, calm):
        sent, self.scene.port.sent = self.scene.port.sent, []
        for name, message in sent:
            if name not in self.runs or (not calm and self.rng.random() < 0.05):
                continue
            if isinstance(message, Submit):
                self.take(name, message, calm)
            elif isinstance(message, Abort):
                for req_id in message.req_ids:
                    self.runs[name].pop(req_id, None)
            elif isinstance(message, Resend):
                self.resend(name, message)

    def take(self, name, submit, calm):
        known = self.runs[name].get(submit.req_id)
        if known is not None and known[0].attempt >= submit.attempt:
            return
        if not calm and self.rng.random() < 0.2:
            self.say(name, Refused(submit.req_id, submit.attempt, "capacity", "full", self.rng.random()))
        else:
            self.runs[name][submit.req_id] = (submit, list(submit.output_ids))

    def resend(self, name, message):
        run = self.runs[name].get(message.req_id)
        if run is None or run[0].attempt != message.attempt:
            self.say(name, Refused(message.req_id, message.attempt, "unknown", ""))
        else:
            self.send_tokens(name, *run, message.from_idx)

    def work(self, name, calm):
        self.say(name, stats(self.scene.members[name].rank))
        for submit, ids in self.runs[name].values():
            if len(ids) < NUM_TOKENS and (calm or self.rng.random() < 0.7):
                ids.append(token(submit.req_id, len(ids)))
                if calm or self.rng.random() > 0.1:
                    self.send_tokens(name, submit, ids, max(0, len(ids) - self.rng.choice((1, 1, 1, 2, 3))))

    def send_tokens(self, name, submit, ids, first_idx):
        finish = FinishReason.LENGTH if len(ids) == NUM_TOKENS else None
        self.say(name, Tokens([TokenChunk(submit.req_id, submit.attempt, first_idx, ids[first_idx:], finish=finish)]))

    def say(self, name, message):
        self.scene.say(name, message, self.now)

    def disturb(self):
        event = self.rng.random()
        if event < 0.3:
            try:
                self.requests.append(self.scene.submit(self.now, max_tokens=NUM_TOKENS))
            except UnavailableError:
                self.scene.num_requests += 1
        elif event < 0.33 and self.requests:
            self.scene.dispatcher.abort([self.rng.choice(self.requests)], self.now)
        elif event < 0.35:
            self.muted_until[self.rng.choice(list(self.muted_until))] = self.now + 4 * self.rng.random()
        elif event < 0.37:
            self.replace(self.rng.choice(list(self.scene.members)))

    def replace(self, name):
        """A worker dies; another comes in its place."""
        rank = self.scene.members.pop(name).rank
        del self.runs[name], self.muted_until[name]
        new = f"w{self.num_workers}"
        self.num_workers += 1
        self.scene.members[new] = member(new, rank)
        self.runs[new], self.muted_until[new] = {}, 0.0
        self.scene.publish(self.now)


@pytest.mark.parametrize("seed", range(25))
def test_every_request_ends_well_or_with_an_error(seed):
    world = World(seed)
    for _ in range(400):
        world.step()
    for _ in range(600):
        world.step(calm=True)
    for request in world.requests:
        sink = request.sink
        assert request.done, request.req_id
        assert sink.ids == [token(request.req_id, idx) for idx in range(len(sink.ids))]
        assert sink.error is None or isinstance(sink.error, AfdError)
        if sink.finish is not None:
            assert len(sink.ids) == NUM_TOKENS
    dispatcher = world.scene.dispatcher
    assert len(dispatcher.queue) == 0
    assert dispatcher.num_running == 0
    assert all(worker.outstanding_tokens == 0 for worker in dispatcher.workers.values())
    finished = sum(request.sink.finish is not None for request in world.requests)
    assert finished > len(world.requests) * 0.6

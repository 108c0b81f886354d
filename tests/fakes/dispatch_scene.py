"""A scripted stage for the dispatcher: workers, a port that records, requests with a sink that records."""

from __future__ import annotations

from afd.gateway.dispatcher import Dispatcher, DispatchLimits
from afd.gateway.sequence import ClientSequence
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import Refused, Submit, TokenChunk, Tokens, WorkerStats
from afd.types import SamplingParams


class Port:
    """Records what is sent."""

    def __init__(self):
        self.sent = []
        self.connected = {}

    def connect(self, key, endpoint):
        self.connected[key] = endpoint

    def disconnect(self, key):
        del self.connected[key]

    def send(self, key, message):
        self.sent.append((key, message))

    def take(self, kind):
        taken = [(key, message) for key, message in self.sent if isinstance(message, kind)]
        self.sent = [entry for entry in self.sent if not isinstance(entry[1], kind)]
        return taken


class Sink:
    """Records what a request gets."""

    def __init__(self):
        self.ids = []
        self.finish = None
        self.error = None

    def push(self, sequence, delta, now):
        self.ids += delta.ids
        self.finish = delta.finish or self.finish

    def fail(self, error):
        self.error = error


def member(name, rank=0, *, ready=True, draining=False, endpoint=None):
    info = WorkerInfo(
        role="attention", incarnation=name, host="h", pid=1, config_hash="", serving=endpoint or f"tcp://{name}"
    )
    return Member(info=info, rank=rank, ready=ready, draining=draining)


def view(*members):
    return ClusterView("c", 1, 1, 1, 1, "m", "", "hybrid", Plan(), list(members))


def stats(rank=0, **fields):
    values = {"num_running": 0, "num_waiting": 0, "kv_blocks_total": 100, "kv_blocks_free": 100}
    return WorkerStats(rank=rank, **{**values, **fields})


class Scene:
    """A dispatcher with workers a, b, ... that have all reported at time 0."""

    def __init__(self, names="a", port=None, **limits):
        self.port = port or Port()
        self.dispatcher = Dispatcher("gateway", DispatchLimits(**limits), self.port)
        self.members = {name: member(name, rank) for rank, name in enumerate(names)}
        self.publish(0.0)
        for rank, name in enumerate(names):
            self.say(name, stats(rank), 0.0)
        self.num_requests = 0

    def publish(self, now):
        self.dispatcher.on_view(view(*self.members.values()), now)

    def say(self, name, message, now):
        self.dispatcher.on_message(name, message, now)

    def alive(self, now):
        """Everyone reports, then the clock ticks."""
        for name, m in self.members.items():
            self.say(name, stats(m.rank), now)
        self.dispatcher.tick(now)

    def submit(self, now=0.0, *, num_prompt=3, max_tokens=10, priority=0, ttft_s=None, count=1):
        sink, sequences = Sink(), []
        for choice in range(count):
            self.num_requests += 1
            sampling = SamplingParams(max_tokens=max_tokens, seed=7, choice=choice)
            sequences.append(
                ClientSequence(f"r{self.num_requests}", choice, [1] * num_prompt, sampling, sink, priority=priority)
            )
        self.dispatcher.submit(sequences, now, ttft_s=ttft_s)
        return sequences[0] if count == 1 else sequences

    def tokens(self, name, sequence, ids, now, finish=None, **fields):
        chunk = TokenChunk(sequence.req_id, sequence.attempt, len(sequence.output_ids), ids, finish=finish, **fields)
        self.say(name, Tokens([chunk]), now)

    def refuse(self, name, sequence, now, reason="capacity", retry_after_s=1.0):
        self.say(name, Refused(sequence.req_id, sequence.attempt, reason, "detail", retry_after_s), now)

    def submits(self):
        return [(key, message.req_id) for key, message in self.port.take(Submit)]

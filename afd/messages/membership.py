"""Every role <-> coordinator: registration, heartbeats, the published view. Unary gRPC calls, msgpack bodies.

A worker registers (any order, any number of times), then calls `Sync` every `heartbeat_s`; the reply carries
the cluster view whenever its version is newer than the caller's. The coordinator is never on the data path.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from afd.messages.codec import Decoder

# Bounds of what is decoded: wide for any real cluster, and such that no message can make the coordinator's state, or
# an answer built from it, unreasonably large.
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Small = Annotated[int, Meta(ge=0, le=1 << 16)]
Counter = Annotated[int, Meta(ge=0, le=1 << 62)]
Epoch = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]  # what a data frame can carry
ExpertId = tuple[Small, Small]  # layer, expert
MAX_SILENT_EXPERTS = 256  # that one worker reports: an operator needs no more to look into a checkpoint


class MeshAddress(msgspec.Struct, frozen=True):
    """Where a rank's stepmesh listens: abstract UNIX name (same host) and TCP host:port."""

    unix: Name
    host: Name
    port: Annotated[int, Meta(ge=0, le=65535)]


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a process says of itself when it registers. Identity is (role, rank, incarnation)."""

    role: Name  # "attention" | "ffn" | "gateway"
    incarnation: Name  # uuid4 hex of this process start
    host: Name
    pid: Counter
    config_hash: Name  # model fingerprint, wire dtype, shapes, slot sizes, protocol version (hex)
    mesh: MeshAddress | None = None  # attention and ffn
    serving: Name = ""  # attention: ZeroMQ endpoint "tcp://host:port"
    metrics: Name = ""  # "host:port" of /metrics, /livez, /readyz
    # asked for (a re-registration or a StatefulSet ordinal); -1 = any free one
    rank: Annotated[int, Meta(ge=-1, le=1 << 16)] = -1


class Plan(msgspec.Struct, frozen=True):
    """Pipeline plan: changes without an epoch; a worker adopts it at each stream's next layer 0.

    max_streams: most that a worker may use.
    max_step_tokens: of one micro-batch.
    gang_window_s: longest wait at layer 0 for the members of the last gang.
    """

    version: Counter = 1
    max_streams: Annotated[int, Meta(ge=1, le=64)] = 3
    max_step_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 256
    gang_window_s: Annotated[float, Meta(ge=0, le=60)] = 0.005

    @property
    def text(self) -> str:
        """One line for people."""
        streams = f"{self.max_streams} stream" + ("s" if self.max_streams > 1 else "")
        return (
            f"plan {self.version}: up to {streams} of {self.max_step_tokens} tokens, "
            f"gang window {self.gang_window_s * 1e3:.1f} ms"
        )


class Member(msgspec.Struct, frozen=True):
    info: WorkerInfo
    rank: Small
    ready: bool = False  # model loaded and data plane connected
    draining: bool = False


class ClusterView(msgspec.Struct, frozen=True):
    """The published state. `version` rises with every change; `epoch` with membership.

    members: the workers that have announced where they can be reached (one still choosing its ports is only in
    the status).
    standbys: FFN workers that hold every shard: with a rank from num_ffn on they wait, with one below they are to take
    that place, and are among the members as soon as they have announced where.
    """

    cluster_id: Name
    version: Counter
    epoch: Epoch  # 0 = not formed yet
    num_attention: Small  # asked for by the topology
    num_ffn: Small
    model: Text
    config_hash: Name
    ffn_parallel: Name
    plan: Plan
    members: Annotated[list[Member], Meta(max_length=1024)]
    shutdown: bool = False
    standbys: Annotated[list[Member], Meta(max_length=64)] = []

    def of_role(self, role: str) -> list[Member]:
        """Members of one role in rank order."""
        return sorted((m for m in self.members if m.info.role == role), key=lambda m: m.rank)

    @property
    def formed(self) -> bool:
        """True when every FFN rank and at least one attention rank is present (an epoch can run)."""
        return self.epoch > 0 and len(self.of_role("ffn")) == self.num_ffn and bool(self.of_role("attention"))


class RegisterRequest(msgspec.Struct, frozen=True):
    info: WorkerInfo
    epoch_seen: Epoch = 0  # the largest epoch this process has lived in: a restarted coordinator adopts the maximum
    last_view: ClusterView | None = None  # the newest view it has: a restarted coordinator resumes from it


class RegisterReply(msgspec.Struct, frozen=True):
    """rank: given to the worker. error: refusal (wrong model, rank taken, role full), one line; rank is -1 then.

    retry: the refusal may pass by itself (the rank's last holder is not yet declared lost): ask again.
    """

    rank: int
    view: ClusterView | None
    error: str = ""
    retry: bool = False


class PairReport(msgspec.Struct, frozen=True):
    """A worker's data-plane complaint about a peer."""

    peer: Name  # "ffn/0"
    broken: bool
    reason: Text = ""


Cost = Annotated[float, Meta(ge=0, le=1e6)]


class StageLines(msgspec.Struct, frozen=True):
    """Seconds of a step's stages as lines through many steps (`afd.sched.trend`), in the form of `StepCosts`."""

    attention: tuple[Cost, Cost, Cost]
    head: tuple[Cost, Cost]
    ffn: tuple[Cost, Cost]


class StepCosts(msgspec.Struct, frozen=True):
    """An attention worker's cost curves (`afd.sched.latency`), in seconds a step, summed over layers; and what it runs.

    attention: base, per token, per KV entry read.
    head: base, per row.
    ffn: base, per token of the gang.
    lines: for readers who look farther than the next steps.
    link_row_s: both ways of the bytes of one of its rows (`afd.sched.link`); None = not known yet.
    tokens, context, rows: a step of all its num_seqs running sequences together, as in `StepLoad`; 0 while it is idle.
    corrections: measured over modelled cycle, by number of streams.
    num_steps: behind the curves.
    gang_size: mean attention workers in the FFN's batches, wait_share: of its time with nothing to compute although
    work was in flight; both since its last report.
    """

    attention: tuple[Cost, Cost, Cost]
    head: tuple[Cost, Cost]
    ffn: tuple[Cost, Cost]
    transfer_s: Cost
    num_steps: Counter
    num_seqs: Counter = 0
    tokens: Cost = 0.0
    context: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    rows: Cost = 0.0
    num_streams: Annotated[int, Meta(ge=1, le=64)] = 1
    gang_size: Cost = 1.0
    wait_share: Cost = 0.0
    corrections: Annotated[dict[int, Cost], Meta(max_length=64)] = {}
    lines: StageLines | None = None
    link_row_s: Cost | None = None


class SyncRequest(msgspec.Struct, frozen=True):
    """Heartbeat. progress: main-loop counter; pending: work is waiting (a counter that then stands still = stalled).

    loading: 0..1 while the model loads.
    stats: flat counters and gauges for `afd status`.
    pairs: every pair of this worker that is broken now (the whole list each time, so a lost call loses nothing).
    silent_experts: ffn: those that receive tokens and give nothing, found since its start; at most the first ones.
    costs: attention: what its pipeline costs, once it has measured it.
    """

    role: Name
    incarnation: Name
    view_version: Counter
    progress: Counter = 0
    pending: bool = False
    loading: float = 1.0
    ready: bool = False
    draining: bool = False
    leaving: bool = False
    epoch_seen: Epoch = 0
    stats: Annotated[dict[Name, float], Meta(max_length=4096)] = {}
    pairs: Annotated[list[PairReport], Meta(max_length=256)] = []
    silent_experts: Annotated[list[ExpertId], Meta(max_length=MAX_SILENT_EXPERTS)] = []
    costs: StepCosts | None = None


class SyncReply(msgspec.Struct, frozen=True):
    """known=False: the coordinator does not know this incarnation: register again. lost: you were declared lost.

    reason: why it was declared lost, one line.
    """

    known: bool
    view: ClusterView | None = None
    lost: bool = False
    reason: str = ""


class FollowRequest(msgspec.Struct, frozen=True):
    """A member asks for every view from now on, the present one first, over a call that stays open.

    The call's end is news, too: the kernel of a process that dies closes its connections.
    """

    incarnation: Name


class StatusRequest(msgspec.Struct, frozen=True):
    pass


class MemberStatus(msgspec.Struct, frozen=True):
    member: Member
    age_s: float  # since its last heartbeat
    loading: float
    stats: dict[str, float]
    silent_experts: list[ExpertId] = []
    costs: StepCosts | None = None


class Forecast(msgspec.Struct, frozen=True):
    """What the coordinator expects of a number of streams, from the workers' cost curves; seconds.

    cycle_s: every stream makes one step; the largest of attention_s (the busiest worker), ffn_s, latency_s (one
    stream's A + F + C), corrected by what such cycles were measured to take.
    gang_size: as measured, of num_workers attention workers that have work.
    """

    num_streams: int
    cycle_s: float
    attention_s: float
    ffn_s: float
    latency_s: float
    gang_size: float
    num_workers: int


class StatusReply(msgspec.Struct, frozen=True):
    """events: newest last, bounded.
    forecasts: by number of streams, as far as the plan may go; [] = not known yet.
    """

    view: ClusterView
    members: list[MemberStatus]
    events: list[str]
    forecasts: list[Forecast] = []


class ControlRequest(msgspec.Struct, frozen=True):
    """action: "shutdown" (drain all and stop) | "drain" with target "attention/1" | "note" with a line as target."""

    action: Name
    target: Name = ""


class ControlReply(msgspec.Struct, frozen=True):
    ok: bool
    error: str = ""


register_request_decoder: Decoder[RegisterRequest] = Decoder(RegisterRequest)
register_reply_decoder: Decoder[RegisterReply] = Decoder(RegisterReply)
sync_request_decoder: Decoder[SyncRequest] = Decoder(SyncRequest)
sync_reply_decoder: Decoder[SyncReply] = Decoder(SyncReply)
follow_request_decoder: Decoder[FollowRequest] = Decoder(FollowRequest)
view_decoder: Decoder[ClusterView] = Decoder(ClusterView)
status_request_decoder: Decoder[StatusRequest] = Decoder(StatusRequest)
status_reply_decoder: Decoder[StatusReply] = Decoder(StatusReply)
control_request_decoder: Decoder[ControlRequest] = Decoder(ControlRequest)
control_reply_decoder: Decoder[ControlReply] = Decoder(ControlReply)

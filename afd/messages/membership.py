"""Every role <-> coordinator: registration, heartbeats, the published view. Unary gRPC calls, msgpack bodies.

A worker registers (any order, any number of times), then calls `Sync` every `heartbeat_s`; the reply carries
the cluster view whenever its version is newer than the caller's. The coordinator is never on the data path.
"""

from __future__ import annotations

import msgspec

from afd.messages.codec import Decoder


class MeshAddress(msgspec.Struct, frozen=True):
    """Where a rank's stepmesh listens: abstract UNIX name (same host) and TCP host:port."""

    unix: str
    host: str
    port: int


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a process says of itself when it registers. Identity is (role, rank, incarnation)."""

    role: str  # "attention" | "ffn" | "gateway"
    incarnation: str  # uuid4 hex of this process start
    host: str
    pid: int
    config_hash: str  # model fingerprint, wire dtype, shapes, slot sizes, protocol version (hex)
    mesh: MeshAddress | None = None  # attention and ffn
    serving: str = ""  # attention: ZeroMQ endpoint "tcp://host:port"
    serving_key: str = ""  # attention: CURVE public key (z85)
    metrics: str = ""  # "host:port" of /metrics, /livez, /readyz
    rank: int = -1  # asked for (a re-registration or a StatefulSet ordinal); -1 = any free one
    num_experts: int = 0  # ffn: routed experts of the model's MoE layers; 0 = a dense model


class Plan(msgspec.Struct, frozen=True):
    """Pipeline plan: may change without an epoch."""

    version: int = 1
    max_streams: int = 3
    max_step_tokens: int = 256
    gang_window_s: float = 0.005  # upper bound of the layer-0 window


class Member(msgspec.Struct, frozen=True):
    info: WorkerInfo
    rank: int
    ready: bool = False  # model loaded and data plane connected
    draining: bool = False


class ClusterView(msgspec.Struct, frozen=True):
    """The published state. `version` rises with every change; `epoch` with membership or placement.

    members: the workers that have announced where they can be reached (one still choosing its ports is only in
    the status).  expert_ranks: FFN rank of each routed expert, [num_experts]; empty for a dense model.
    """

    cluster_id: str
    version: int
    epoch: int  # 0 = not formed yet
    num_attention: int  # asked for by the topology
    num_ffn: int
    model: str
    config_hash: str
    ffn_parallel: str
    plan: Plan
    members: list[Member]
    shutdown: bool = False
    expert_ranks: list[int] = []

    def of_role(self, role: str) -> list[Member]:
        """Members of one role in rank order."""
        return sorted((m for m in self.members if m.info.role == role), key=lambda m: m.rank)

    @property
    def formed(self) -> bool:
        """True when every FFN rank and at least one attention rank is present (an epoch can run)."""
        return self.epoch > 0 and len(self.of_role("ffn")) == self.num_ffn and bool(self.of_role("attention"))


class RegisterRequest(msgspec.Struct, frozen=True):
    info: WorkerInfo
    epoch_seen: int = 0  # the largest epoch this process has lived in: a restarted coordinator adopts the maximum
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

    peer: str  # "ffn/0"
    broken: bool
    reason: str = ""


class SyncRequest(msgspec.Struct, frozen=True):
    """Heartbeat. progress: main-loop counter; pending: work is waiting (a counter that then stands still = stalled).

    loading: 0..1 while the model loads.  stats: flat counters and gauges for `afd status`.
    pairs: every pair of this worker that is broken now (the whole list each time, so a lost call loses nothing).
    """

    role: str
    incarnation: str
    view_version: int
    progress: int = 0
    pending: bool = False
    loading: float = 1.0
    ready: bool = False
    draining: bool = False
    leaving: bool = False
    epoch_seen: int = 0
    stats: dict[str, float] = {}
    pairs: list[PairReport] = []


class SyncReply(msgspec.Struct, frozen=True):
    """known=False: the coordinator does not know this incarnation: register again. lost: you were declared lost.

    reason: why it was declared lost, one line.
    """

    known: bool
    view: ClusterView | None = None
    lost: bool = False
    reason: str = ""


class StatusRequest(msgspec.Struct, frozen=True):
    pass


class MemberStatus(msgspec.Struct, frozen=True):
    member: Member
    age_s: float  # since its last heartbeat
    loading: float
    stats: dict[str, float]


class StatusReply(msgspec.Struct, frozen=True):
    view: ClusterView
    members: list[MemberStatus]
    events: list[str]  # newest last, bounded


class ControlRequest(msgspec.Struct, frozen=True):
    """action: "shutdown" (drain all and stop) | "drain" with target "attention/1" | "note" with a line as target."""

    action: str
    target: str = ""


class ControlReply(msgspec.Struct, frozen=True):
    ok: bool
    error: str = ""


register_request_decoder: Decoder[RegisterRequest] = Decoder(RegisterRequest)
register_reply_decoder: Decoder[RegisterReply] = Decoder(RegisterReply)
sync_request_decoder: Decoder[SyncRequest] = Decoder(SyncRequest)
sync_reply_decoder: Decoder[SyncReply] = Decoder(SyncReply)
status_request_decoder: Decoder[StatusRequest] = Decoder(StatusRequest)
status_reply_decoder: Decoder[StatusReply] = Decoder(StatusReply)
control_request_decoder: Decoder[ControlRequest] = Decoder(ControlRequest)
control_reply_decoder: Decoder[ControlReply] = Decoder(ControlReply)

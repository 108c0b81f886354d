"""Who may talk to whom, and over what. Pure.

`Epochs` are the live ones: they tell which peers to reach, which to drop, and in which epochs a peer's
dispatches may be (`PeerEpochs`). `admit` is an FFN rank's decision about an authenticated hello; `choose_transport`
picks the transport of a pair by what both ends offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError
from stepmesh.handshake import Hello
from stepmesh.types import Member, RankId


class EpochChange(NamedTuple):
    """What a new member list asks for. A replaced rank (another incarnation) is in both lists."""

    dropped: tuple[RankId, ...]
    added: tuple[Member, ...]


class PeerEpochs(NamedTuple):
    """The epochs of which one process may be a member: from the oldest live one to the newest, but those `without` it.

    An epoch between live ones that this end has not heard of counts: members that join at the same time raise the epoch
    several times, and each end fetches the list when it is its turn.
    """

    oldest: int
    newest: int
    without: frozenset[int]  # live, and known not to have it as a member

    def hold(self, epoch: int) -> bool:
        return self.oldest <= epoch <= self.newest and epoch not in self.without

    def objection(self, epoch: int) -> str:
        """Why `epoch`, which they do not hold, is refused."""
        if epoch in self.without:
            return f"epoch {epoch} is without this peer"
        return f"epoch {epoch} is not live (oldest {self.oldest}, newest {self.newest})"


class Epochs:
    """The other role's ranks, by live epoch."""

    def __init__(self, config: MeshConfig) -> None:
        self._role = config.id.role
        self._epochs: dict[int, dict[RankId, Member]] = {}
        self._retired = -1
        self.live_epochs: frozenset[int] = frozenset()

    def members(self) -> dict[RankId, Member]:
        """Every rank of any live epoch; where epochs disagree the newer one counts."""
        merged: dict[RankId, Member] = {}
        for epoch in sorted(self._epochs):
            merged.update(self._epochs[epoch])
        return merged

    def set_members(self, epoch: int, members: Iterable[Member]) -> EpochChange:
        """Add an epoch. Idempotent. Raises ConfigError for a contradiction."""
        table = {member.id: member for member in members}
        for rank_id in table:
            if rank_id.role is self._role:
                raise ConfigError(f"{rank_id} cannot be a peer of an {self._role.value} rank")
        if not 0 <= epoch < 1 << 32:
            raise ConfigError(f"epoch {epoch} does not fit 32 bits")
        if epoch <= self._retired:
            raise ConfigError(f"epoch {epoch} was retired already (up to {self._retired})")
        known = self._epochs.get(epoch)
        if known is not None and known != table:
            raise ConfigError(f"epoch {epoch} already has other members: a new list needs a new epoch")
        before = self.members()
        self._epochs[epoch] = table
        self.live_epochs = frozenset(self._epochs)
        return _difference(before, self.members())

    def retire_epoch(self, epoch: int) -> EpochChange:
        """Forget this epoch and all before it. Idempotent."""
        before = self.members()
        self._retired = max(self._retired, epoch)
        for old in [number for number in self._epochs if number <= epoch]:
            del self._epochs[old]
        self.live_epochs = frozenset(self._epochs)
        return _difference(before, self.members())

    def of(self, rank_id: RankId, incarnation: str) -> PeerEpochs:
        """The epochs in which dispatches of that process may be, until the members change again."""
        without = [
            epoch
            for epoch, table in self._epochs.items()
            if (member := table.get(rank_id)) is None or member.incarnation != incarnation
        ]
        oldest, newest = min(self._epochs, default=self._retired + 1), max(self._epochs, default=self._retired)
        return PeerEpochs(oldest, newest, frozenset(without))


def _difference(before: dict[RankId, Member], after: dict[RankId, Member]) -> EpochChange:
    dropped = tuple(
        rank_id
        for rank_id, member in before.items()
        if rank_id not in after or after[rank_id].incarnation != member.incarnation
    )
    added = tuple(
        member
        for rank_id, member in after.items()
        if rank_id not in before or before[rank_id].incarnation != member.incarnation
    )
    return EpochChange(dropped, added)


class Choice(NamedTuple):
    """A transport and why it was chosen, in words for logs and metrics."""

    transport: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a hello is turned away. `retryable`: it may be accepted later."""

    reason: str
    retryable: bool


def geometry(config: MeshConfig) -> dict[str, int]:
    """The numbers that fix slot sizes: both ends must have the same."""
    return {**config.layout.to_dict(), "num_streams": config.num_streams}


def admit(hello: Hello, config: MeshConfig, members: dict[RankId, Member], last_generation: int) -> Refusal | None:
    """An FFN rank's answer to an authenticated hello: None to accept. `last_generation` of that very incarnation."""
    if hello.target != config.id or hello.target_incarnation != config.incarnation:
        return Refusal(
            f"{hello.id} wants {hello.target} incarnation {hello.target_incarnation}, "
            f"this is {config.id} incarnation {config.incarnation}",
            retryable=True,
        )
    if hello.id.role is config.id.role:
        return Refusal(f"{hello.id} and {config.id} have the same role", retryable=False)
    if hello.config_hash != config.config_hash.hex():
        return Refusal(
            f"configuration differs: {hello.id} has {hello.config_hash[:16]}, "
            f"{config.id} has {config.config_hash.hex()[:16]} (another model, dtype or shape?)",
            retryable=False,
        )
    own = geometry(config)
    differing = [
        name for name in sorted(own.keys() | hello.geometry.keys()) if own.get(name) != hello.geometry.get(name)
    ]
    if differing:
        sides = ", ".join(f"{name} {hello.geometry.get(name)} against {own.get(name)}" for name in differing)
        return Refusal(f"slot geometry differs, {hello.id} against {config.id}: {sides}", retryable=False)
    member = members.get(hello.id)
    if member is None or member.incarnation != hello.incarnation:
        return Refusal(f"{hello.id} incarnation {hello.incarnation} is in no live epoch here (yet)", retryable=True)
    if hello.generation <= last_generation:
        return Refusal(f"generation {hello.generation} is not above {last_generation}", retryable=True)
    return None


_LINK_OF = {"shm": "unix", "tcp": "tcp"}  # shm passes descriptors, tcp dials where its control link goes


def choose_transport(
    offered: Sequence[str], own: Sequence[str], link_kind: str, withheld: str = ""
) -> Choice | Refusal:
    """The first transport in the initiator's order that both ends offer and that the control link can serve.

    `withheld`: what the initiator does not offer this time, and why.
    """
    common = [name for name in offered if name in own]
    usable = [name for name in common if _LINK_OF.get(name, link_kind) == link_kind]
    if not usable:
        return Refusal(
            f"no transport in common: the initiator offers {list(offered)}, the responder {list(own)}, "
            f"the control link is {link_kind}",
            retryable=False,
        )
    name = usable[0]
    if name == "shm":
        return Choice(name, "same host: the peer's UNIX socket connects")
    reasons = []
    if "shm" in common:
        reasons.append("the peer's UNIX socket cannot be reached: another host or network namespace")
    if name == "verbs":
        reasons.append("both ends have an active RDMA port")
    elif withheld:
        reasons.append(f"withheld by the initiator: {withheld}")
    elif "verbs" in {*offered, *own}:
        reasons.append(f"only the {'initiator' if 'verbs' in offered else 'responder'} has an active RDMA port")
    if not reasons:
        reasons.append(f"the only one in common (initiator {list(offered)}, responder {list(own)})")
    return Choice(name, "; ".join(reasons))

"""What a process may say when it registers, whatever this coordinator knows. Pure."""

from __future__ import annotations

from afd.coordinator.members import ATTENTION, FFN, GATEWAY
from afd.errors import CoordinatorError
from afd.messages.membership import RegisterRequest

MAX_ATTENTION = 128  # width of the gang member mask
MAX_GATEWAYS = 64
MAX_VERSION_SEEN = 1 << 48
MAX_EPOCH_SEEN = 1 << 31  # half of what a data frame can carry: nobody has lived so long, and room is left


class RefusedError(CoordinatorError):
    """A registration that cannot be granted.

    retry: it may be later, without anyone changing anything.
    """

    def __init__(self, message: str, *, retry: bool = False):
        super().__init__(message)
        self.retry = retry


def check_claims(request: RegisterRequest) -> None:
    """Refuse what no coordinator can have said: it would be believed by one that was restarted."""
    seen = request.last_view
    if max(request.epoch_seen, seen.epoch if seen is not None else 0) > MAX_EPOCH_SEEN:
        raise RefusedError(f"an epoch above {MAX_EPOCH_SEEN} cannot have been")
    if seen is None:
        return
    if seen.version > MAX_VERSION_SEEN:
        raise RefusedError(f"a view's version above {MAX_VERSION_SEEN} cannot have been")
    sizes = {ATTENTION: MAX_ATTENTION, FFN: seen.num_ffn, GATEWAY: MAX_GATEWAYS}
    places = {(member.info.role, member.rank) for member in seen.members}
    names = {member.info.incarnation for member in seen.members}
    if len(places) < len(seen.members) or len(names) < len(seen.members):
        raise RefusedError("the last view has two members in one place")
    if not all(rank < sizes.get(role, 0) for role, rank in places):
        raise RefusedError("the last view has a member in a place that does not exist")

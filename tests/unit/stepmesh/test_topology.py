"""Membership arithmetic, admission, choice of transport."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError
from stepmesh.handshake import Hello
from stepmesh.layout import PayloadLayout
from stepmesh.topology import Choice, Epochs, Refusal, admit, choose_transport, geometry
from stepmesh.types import Address, Member, RankId, Role, WireDtype

CONFIG = MeshConfig(
    id=RankId(Role.FFN, 0),
    incarnation="me",
    secret=b"s" * 16,
    config_hash=b"agreed",
    layout=PayloadLayout(8, 4, 2, WireDtype.FP32, WireDtype.BF16),
)


def member(rank: int, incarnation: str = "a") -> Member:
    return Member(RankId(Role.ATTENTION, rank), incarnation, Address("", "host", rank))


def ranks(members: tuple[Member, ...]) -> list[tuple[int, str]]:
    return [(one.id.rank, one.incarnation) for one in members]


def test_a_new_epoch_adds_and_keeps() -> None:
    epochs = Epochs(CONFIG)
    change = epochs.set_members(1, [member(0), member(1)])
    assert (change.dropped, ranks(change.added)) == ((), [(0, "a"), (1, "a")])
    change = epochs.set_members(2, [member(1), member(2)])
    assert (change.dropped, ranks(change.added)) == ((), [(2, "a")])
    assert epochs.live_epochs == {1, 2}
    change = epochs.retire_epoch(1)
    assert change.dropped == (RankId(Role.ATTENTION, 0),)
    assert epochs.live_epochs == {2}
    assert epochs.retire_epoch(1) == ((), ())


def test_a_peer_may_be_in_missed_epochs_and_not_where_others_are_known_to_be() -> None:
    epochs = Epochs(CONFIG)
    epochs.retire_epoch(1)
    assert epochs.of(RankId(Role.ATTENTION, 0), "a") == (2, 1, set())
    epochs.set_members(2, [member(0)])
    epochs.set_members(5, [member(0), member(1)])
    epochs.set_members(6, [member(0, "b"), member(1)])
    held = {
        (rank, name): [epoch for epoch in range(9) if epochs.of(RankId(Role.ATTENTION, rank), name).hold(epoch)]
        for rank, name in ((0, "a"), (0, "b"), (1, "a"))
    }
    assert held == {(0, "a"): [2, 3, 4, 5], (0, "b"): [3, 4, 6], (1, "a"): [3, 4, 5, 6]}


def test_another_incarnation_replaces() -> None:
    epochs = Epochs(CONFIG)
    epochs.set_members(1, [member(0, "old")])
    change = epochs.set_members(2, [member(0, "new")])
    assert change.dropped == (RankId(Role.ATTENTION, 0),)
    assert ranks(change.added) == [(0, "new")]
    # An older epoch that comes late does not bring the old one back.
    assert epochs.retire_epoch(1) == ((), ())


def test_contradictions_are_refused() -> None:
    epochs = Epochs(CONFIG)
    epochs.set_members(3, [member(0)])
    assert epochs.set_members(3, [member(0)]) == ((), ())
    with pytest.raises(ConfigError, match="already has other members"):
        epochs.set_members(3, [member(1)])
    with pytest.raises(ConfigError, match="cannot be a peer"):
        epochs.set_members(4, [Member(RankId(Role.FFN, 1), "a", Address("", "h", 1))])
    with pytest.raises(ConfigError, match="32 bits"):
        epochs.set_members(1 << 32, [])
    epochs.retire_epoch(3)
    with pytest.raises(ConfigError, match="was retired"):
        epochs.set_members(2, [])


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 8), st.dictionaries(st.integers(0, 4), st.sampled_from("ab"))),
        max_size=12,
    )
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_changes_add_up_to_the_members(actions: list[tuple[bool, int, dict[int, str]]]) -> None:
    """Whoever follows the changes has the same table as whoever reads it."""
    epochs = Epochs(CONFIG)
    followed: dict[RankId, Member] = {}
    for retire, epoch, table in actions:
        try:
            change = (
                epochs.retire_epoch(epoch)
                if retire
                else epochs.set_members(epoch, [member(rank, name) for rank, name in table.items()])
            )
        except ConfigError:
            continue
        for rank_id in change.dropped:
            del followed[rank_id]
        for one in change.added:
            assert one.id not in followed
            followed[one.id] = one
        assert followed == epochs.members()


MEMBERS = {RankId(Role.ATTENTION, 5): member(5, "theirs")}
HELLO = Hello(
    id=RankId(Role.ATTENTION, 5),
    incarnation="theirs",
    config_hash=b"agreed".hex(),
    geometry=geometry(CONFIG),
    transports=("tcp",),
    generation=3,
    target=CONFIG.id,
    target_incarnation="me",
)


def test_a_member_is_admitted() -> None:
    assert admit(HELLO, CONFIG, MEMBERS, last_generation=2) is None


@pytest.mark.parametrize(
    ("changes", "reason", "retryable"),
    [
        ({"target": RankId(Role.FFN, 1)}, "wants ffn/1", True),
        ({"target_incarnation": "my ancestor"}, "incarnation my ancestor", True),
        ({"id": RankId(Role.FFN, 5)}, "same role", False),
        ({"config_hash": "00"}, "another model, dtype or shape", False),
        ({"geometry": geometry(CONFIG) | {"hidden": 9}}, "hidden 9 against 8", False),
        ({"geometry": {}}, "num_streams None against 4", False),
        ({"incarnation": "unknown"}, "no live epoch", True),
        ({"id": RankId(Role.ATTENTION, 6)}, "no live epoch", True),
        ({"generation": 2}, "generation 2 is not above 2", True),
    ],
)
def test_refusals_say_why(changes: dict[str, object], reason: str, retryable: bool) -> None:
    hello = dataclasses.replace(HELLO, **changes)  # type: ignore[arg-type]
    refusal = admit(hello, CONFIG, MEMBERS, last_generation=2)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert refusal.retryable is retryable


@pytest.mark.parametrize(
    ("offered", "own", "link", "choice"),
    [
        (["shm", "tcp"], ["shm", "tcp"], "unix", "shm"),
        (["shm", "tcp"], ["shm", "tcp"], "tcp", "tcp"),
        (["tcp"], ["shm", "tcp"], "tcp", "tcp"),
        (["shm", "tcp"], ["tcp"], "tcp", "tcp"),
        (["shm"], ["shm", "tcp"], "unix", "shm"),
        (["shm"], ["tcp"], "tcp", None),
        (["tcp"], ["shm", "tcp"], "unix", None),
        (["inproc"], ["inproc"], "inproc", "inproc"),
        ([], ["tcp"], "tcp", None),
    ],
)
def test_choice_of_transport(offered: list[str], own: list[str], link: str, choice: str | None) -> None:
    verdict = choose_transport(offered, own, link)
    if choice is None:
        assert isinstance(verdict, Refusal)
        assert not verdict.retryable
    else:
        assert isinstance(verdict, Choice)
        assert verdict.transport == choice
        assert verdict.reason


def test_a_fallback_says_that_it_is_one() -> None:
    verdict = choose_transport(["shm", "tcp"], ["shm", "tcp"], "tcp")
    assert "cannot be reached" in verdict.reason

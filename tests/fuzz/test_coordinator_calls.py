"""Mutated calls to the coordinator: with the token anything at all may come, and the state stays sound; without it
nothing is even read.

The volume goes into the state behind the decoder, as the service does it; a sample goes through real gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import msgspec
import pytest

from afd.config import resolve_config
from afd.coordinator.door import MAX_REQUEST_BYTES
from afd.coordinator.members import Timing
from afd.coordinator.plan import PlanRules
from afd.coordinator.service import CoordinatorServer
from afd.coordinator.state import ClusterSpec, CoordinatorState
from afd.membership.client import MAX_REPLY_BYTES, SERVICE
from afd.messages.codec import Decoder, MessageError, encode
from afd.messages.membership import (
    ControlRequest,
    Member,
    MeshAddress,
    PairReport,
    RegisterRequest,
    StatusRequest,
    SyncRequest,
    WorkerInfo,
    control_request_decoder,
    register_request_decoder,
    status_request_decoder,
    sync_request_decoder,
)
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes, mutate_value

TOKEN = "a token of the tests"
ROLES = ("attention", "ffn", "gateway")
ALLOWED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
MAX_EPOCH = (1 << 32) - 1  # stands in 32 bits of every data frame

Call = Callable[[msgspec.Struct, float], msgspec.Struct]


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("afd")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def fresh_state() -> CoordinatorState:
    config = resolve_config(None, {"cluster.topology": "1A1F"})
    spec = ClusterSpec(config.topology, "model", config.cluster.ffn_parallel, PlanRules.of(config))
    return CoordinatorState(spec, Timing(), cluster_id="c", now=0.0)


def info(rng: random.Random, number: int) -> WorkerInfo:
    role = ROLES[number % 3]
    mesh = MeshAddress("", "127.0.0.1", 4000 + number) if role != "gateway" else None
    serving = "tcp://127.0.0.1:1" if role == "attention" else ""
    return WorkerInfo(role, f"incarnation-{number}", "host", 1, "same", mesh, serving, rank=rng.choice((-1, 0, 1)))


def valid_call(rng: random.Random, state: CoordinatorState) -> tuple[str, msgspec.Struct]:
    """Something that a member, or an operator, could say."""
    who = info(rng, rng.randrange(9))
    match rng.randrange(10):
        case 0:
            return "Status", StatusRequest()
        case 1:
            action = rng.choice(("drain", "drain", "drain", "nonsense"))
            return "Control", ControlRequest(action, rng.choice(("attention/0", "ffn/1", "gateway/0", "x/9")))
        case 2 | 3 | 4:
            view = state.view if rng.random() < 0.5 else None
            return "Register", RegisterRequest(who, rng.randrange(5), view)
        case _:
            pairs = [PairReport("ffn/0", True, "because")] if rng.random() < 0.2 else []
            return "Sync", SyncRequest(
                who.role,
                who.incarnation,
                1,
                rng.randrange(99),
                ready=True,
                leaving=rng.random() < 0.05,
                pairs=pairs,
                silent_experts=[(rng.randrange(3), rng.randrange(9)) for _ in range(rng.randrange(3))],
            )


def mutated(rng: random.Random, message: msgspec.Struct) -> bytes:
    raw = encode(message)
    if rng.random() < 0.4:
        return raw
    if rng.random() < 0.25:
        return mutate_bytes(rng, raw)
    value = msgspec.msgpack.decode(raw)
    for _ in range(rng.choice((1, 1, 2))):
        value = mutate_value(rng, value)
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:  # an integer that msgpack cannot carry
        return mutate_bytes(rng, raw)


DECODERS: dict[str, Decoder[msgspec.Struct]] = {
    "Register": register_request_decoder,  # type: ignore[dict-item]
    "Sync": sync_request_decoder,  # type: ignore[dict-item]
    "Status": status_request_decoder,  # type: ignore[dict-item]
    "Control": control_request_decoder,  # type: ignore[dict-item]
}


def calls_of(state: CoordinatorState) -> dict[str, Call]:
    return {
        "Register": state.register,  # type: ignore[dict-item]
        "Sync": state.sync,  # type: ignore[dict-item]
        "Status": lambda _, now: state.status(now),
        "Control": state.control,  # type: ignore[dict-item]
    }


def check(state: CoordinatorState, now: float) -> None:
    """The view and the status can be sent, and what they say can be."""
    view = state.view
    assert 0 <= view.epoch <= MAX_EPOCH
    assert 0 <= view.version < 1 << 62
    assert len(encode(state.status(now))) < MAX_REPLY_BYTES
    places = [(member.info.role, member.rank) for member in view.members]
    assert len(set(places)) == len(places)
    assert {role for role, _ in places} <= set(ROLES)
    assert all(0 <= rank < {"attention": 128, "ffn": 1, "gateway": 64}[role] for role, rank in places)


def test_mutated_calls() -> None:
    num_cases = volume(30_000, 2_000)
    rng = generator("coordinator calls", num_cases)
    num_taken = num_refused = num_epochs = 0
    gauge = MemoryGauge(num_cases)
    state, now = fresh_state(), 0.0
    calls = calls_of(state)
    for number in range(num_cases):
        now += rng.choice((0.0, 0.001, 0.01, 0.1))
        name, message = valid_call(rng, state)
        try:
            request = DECODERS[name].decode(mutated(rng, message))
        except MessageError:
            num_refused += 1
        else:
            before = state.view.epoch
            encode(calls[name](request, now))
            num_taken += 1
            num_epochs += state.view.epoch > before
        state.tick(now)
        state.take_actions()
        if number % 20 == 0:
            check(state, now)
        if number % 500 == 499:
            state = fresh_state()  # ranks may be taken for good by now, or the cluster be shut down
            calls = calls_of(state)
        gauge.step()
    gauge.check()
    assert num_taken > num_cases // 4
    assert num_refused > num_cases // 20
    assert num_epochs > num_cases // 1000


def test_an_honest_cluster_forms_after_all_that() -> None:
    rng = generator("coordinator, then honest workers", volume(40, 4))
    for _ in range(volume(40, 4)):
        state, now = fresh_state(), 0.0
        calls = calls_of(state)
        for _ in range(200):
            now += 0.01
            name, message = valid_call(rng, state)
            if name == "Control":
                continue
            try:
                calls[name](DECODERS[name].decode(mutated(rng, message)), now)
            except MessageError:
                continue
        for _ in range(400):  # the others fall silent and are declared lost: somebody else can be heard
            now += 0.1
            state.status(now)
            state.tick(now)
        for number in range(2):
            role = ("attention", "ffn")[number % 2]
            mesh = MeshAddress("", "127.0.0.1", number)
            reply = state.register(
                RegisterRequest(WorkerInfo(role, f"honest-{number}", "host", 1, "same", mesh, "tcp://h:1")), now
            )
            assert reply.rank >= 0, reply.error
        assert state.view.formed
        assert len(state.view.members) == 2


@pytest.fixture
def server() -> Iterator[CoordinatorServer]:
    with contextlib.closing(started()) as warm, grpc.insecure_channel(warm.address) as channel:
        call(channel, "Status", b"")  # what gRPC makes once per process is made here
    with nothing_left(), contextlib.closing(started()) as server:
        yield server


def started() -> CoordinatorServer:
    server = CoordinatorServer(fresh_state(), address="127.0.0.1:0", token=TOKEN)
    server.start()
    return server


def call(channel: grpc.Channel, method: str, body: bytes, token: str | None = TOKEN) -> grpc.StatusCode:
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    try:
        channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return, attr-defined]
    return grpc.StatusCode.OK


def test_hostile_calls_over_grpc(server: CoordinatorServer) -> None:
    num_cases = volume(2_000, 100)
    rng = generator("coordinator over gRPC", num_cases)
    state = fresh_state()
    seen: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(8) as pool:

        def one(case: tuple[str, bytes, str | None]) -> grpc.StatusCode:
            return call(channel, *case)

        cases: list[tuple[str, bytes, str | None]] = []
        for _ in range(num_cases):
            name, message = valid_call(rng, state)
            body = mutated(rng, message) if rng.random() < 0.8 else rng.randbytes(rng.randrange(3000))
            token = TOKEN if rng.random() < 0.7 else rng.choice((None, "", "x", TOKEN[:-1], TOKEN + "x"))
            cases.append((rng.choice((name, name, name, "Nothing", "")), body, token))
        for case, code in zip(cases, pool.map(one, cases), strict=True):
            seen[code] = seen.get(code, 0) + 1
            if code in ALLOWED:
                continue
            assert (code is grpc.StatusCode.OK) == (case[2] == TOKEN), (case, code)
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL), (case, code)
        for method in DECODERS:
            assert call(channel, method, bytes(MAX_REQUEST_BYTES + 1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert call(channel, method, b"", token="x" * 30_000) is not grpc.StatusCode.OK
        assert call(channel, "Status", encode(StatusRequest())) is grpc.StatusCode.OK
    assert seen[grpc.StatusCode.UNAUTHENTICATED] > num_cases // 10
    assert seen[grpc.StatusCode.OK] > num_cases // 10


def test_claims_that_cannot_be_true_are_refused() -> None:
    """A view that no coordinator published would be believed by one that was restarted."""
    who = WorkerInfo("attention", "a", "host", 1, "same", MeshAddress("", "127.0.0.1", 1))
    view = fresh_state().view
    member, twin = Member(who, 0), Member(msgspec.structs.replace(who, incarnation="b"), 0)
    bad_views = (
        msgspec.structs.replace(view, epoch=(1 << 31) + 1),
        msgspec.structs.replace(view, epoch=3, version=1 << 60),
        msgspec.structs.replace(view, epoch=3, members=[member, twin]),
        msgspec.structs.replace(view, epoch=3, members=[member, Member(who, 1)]),
        msgspec.structs.replace(view, epoch=3, members=[Member(who, 500)]),
        msgspec.structs.replace(view, epoch=3, members=[Member(msgspec.structs.replace(who, role="judge"), 0)]),
    )
    for claim in (*(RegisterRequest(who, 0, bad) for bad in bad_views), RegisterRequest(who, (1 << 31) + 1)):
        state = fresh_state()
        reply = state.register(claim, 0.0)
        assert (reply.rank, reply.retry) == (-1, False), claim
        assert state.view == fresh_state().view


@pytest.mark.parametrize("rank", [1 << 40, -2])
def test_sizes_that_no_cluster_has_are_no_message(rank: int) -> None:
    raw = encode(RegisterRequest(WorkerInfo("ffn", "a", "host", 1, "same", rank=rank)))
    with pytest.raises(MessageError, match="rank"):
        register_request_decoder.decode(raw)

"""Small values: configuration, identities, statistics, trace, spin policy, tensors."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import stepmesh
from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, MeshError
from stepmesh.layout import PayloadLayout
from stepmesh.spin import SpinPolicy
from stepmesh.stats import MeshStats
from stepmesh.tensor import to_numpy, to_torch, torch_dtype
from stepmesh.trace import Stage, Trace
from stepmesh.types import Address, Member, RankId, Role, WireDtype

GOOD: dict[str, Any] = {
    "id": RankId(Role.FFN, 0),
    "incarnation": "x",
    "secret": b"a very secret key",
    "config_hash": b"h",
    "layout": PayloadLayout(8, 4, 2, WireDtype.FP32, WireDtype.BF16),
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"id": RankId(Role.FFN, 128)}, "rank 128"),
        ({"incarnation": ""}, "incarnation"),
        ({"incarnation": "x" * 65}, "incarnation"),
        ({"secret": b"short"}, "secret has 5 bytes"),
        ({"config_hash": b""}, "config_hash"),
        ({"num_streams": 0}, "num_streams 0"),
        ({"num_streams": 65}, "num_streams 65"),
        ({"transport": "pigeon"}, "'pigeon'"),
        ({"heartbeat_s": 0.0}, "heartbeat_s"),
        ({"peer_timeout_s": 0.3}, "twice heartbeat_s"),
        ({"spin_us": -1}, "spin_us"),
        ({"max_pending": 0}, "max_pending"),
    ],
)
def test_configuration_problems_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        MeshConfig(**(GOOD | changes))


def test_all_configuration_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MeshConfig(**(GOOD | {"secret": b"", "num_streams": 0}))
    assert "secret" in str(caught.value)
    assert "num_streams" in str(caught.value)


def test_the_secret_is_never_shown() -> None:
    config = MeshConfig(**GOOD)
    assert "secret" not in repr(config)
    assert "num_streams=4" in repr(config)


def test_slot_sizes_by_role() -> None:
    ffn = MeshConfig(**GOOD)
    attention = dataclasses.replace(ffn, id=RankId(Role.ATTENTION, 0))
    assert ffn.rx_slot_bytes == attention.tx_slot_bytes == ffn.layout.dispatch_slot_bytes
    assert ffn.tx_slot_bytes == attention.rx_slot_bytes == ffn.layout.combine_slot_bytes


def test_identities() -> None:
    rank_id = RankId(Role.ATTENTION, 7)
    assert str(rank_id) == "attention/7"
    assert {rank_id: 1}[RankId(Role.ATTENTION, 7)] == 1
    member = Member(rank_id, "abc", Address("name", "host", 80))
    assert Member.from_dict(json.loads(json.dumps(member.to_dict()))) == member
    assert pickle.loads(pickle.dumps(member)) == member  # tests and benches pass it to processes


def test_every_error_is_a_mesh_error() -> None:
    errors = [getattr(stepmesh, name) for name in stepmesh.__all__ if name.endswith("Error")]
    assert len(errors) == 10
    assert all(issubclass(error, MeshError) for error in errors)
    assert issubclass(ConfigError, ValueError)


def test_statistics_are_plain_values() -> None:
    stats = MeshStats()
    stats.peer("ffn/0").sent_messages += 2
    assert stats.peer("ffn/0").sent_messages == 2
    assert json.loads(json.dumps(stats.snapshot()))["peers"]["ffn/0"]["sent_messages"] == 2


def test_the_trace_keeps_the_newest() -> None:
    trace = Trace(2)
    for seq in range(3):
        trace.record((1e-8 * seq, Stage.DISPATCH_POSTED, RankId(Role.FFN, 1), 0, 4, seq))
    assert [event["seq"] for event in trace.dump()] == [1, 2]
    assert trace.dump()[0] == {
        "time_ns": 10,
        "stage": "dispatch_posted",
        "peer": "ffn/1",
        "stream": 0,
        "layer": 4,
        "seq": 1,
    }
    off = Trace(0)
    off.record((0.0, Stage.PEER_UP, RankId(Role.FFN, 1), 0, 0, 0))
    assert off.dump() == []


def test_spinning_stops_where_it_does_not_pay() -> None:
    policy = SpinPolicy(1.0)
    for _ in range(5):
        assert policy.budget_s() == 1.0
        policy.hit()
    tries = 0
    for _ in range(1000):
        if policy.budget_s():
            tries += 1
            policy.missed(50.0)
    assert 15 <= tries <= 25
    while not policy.budget_s():
        pass
    policy.hit()  # things have changed
    assert policy.budget_s() == 1.0


def test_spinning_reaches_for_what_it_just_missed() -> None:
    policy = SpinPolicy(1.0)
    assert policy.budget_s() == 1.0
    policy.missed(3.0)
    assert policy.budget_s() == 2.0
    policy.missed(7.0)
    assert policy.budget_s() == 4.0
    policy.hit()
    assert policy.budget_s() == 4.0
    policy.missed(7.0)
    assert policy.budget_s() == 8.0
    policy.missed(8.0)  # as far as it goes, and still in vain
    assert policy.budget_s() == 0.0
    assert policy.budget_s() == 1.0
    policy.missed(100.0)
    assert [policy.budget_s() for _ in range(4)] == [0.0, 0.0, 0.0, 1.0]


def test_spinning_can_be_off() -> None:
    assert SpinPolicy(0.0).budget_s() == 0.0


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_tensors_and_rows_share_memory(dtype: WireDtype) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(torch_dtype(dtype))
    rows = to_numpy(tensor)
    assert rows.dtype == dtype.numpy
    assert rows.shape == (3, 4)
    again = to_torch(rows, dtype)
    assert again.dtype is tensor.dtype
    assert again.data_ptr() == tensor.data_ptr() == rows.ctypes.data
    assert torch.equal(again.float(), tensor.float())
    rows[0] = rows[2]
    assert torch.equal(tensor[0].float(), tensor[2].float())


def test_empty_tensors_cross_too() -> None:
    for dtype in WireDtype:
        assert to_torch(np.zeros((0, 4), dtype.numpy), dtype).shape == (0, 4)
        assert to_numpy(torch.zeros(0, 4, dtype=torch_dtype(dtype))).shape == (0, 4)


def test_what_the_wire_cannot_carry_is_refused() -> None:
    with pytest.raises(ConfigError, match="no wire type"):
        to_numpy(torch.zeros(1, 1, dtype=torch.float64))
    with pytest.raises(ConfigError, match="rows are float32"):
        to_torch(np.zeros((1, 1), np.float32), WireDtype.BF16)
    with pytest.raises(ConfigError, match="copy it to host memory"):
        to_numpy(torch.zeros(1, 1, device="meta"))


def test_the_core_needs_no_torch() -> None:
    import ast
    from pathlib import Path

    package = Path(stepmesh.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torch" for name in names):
                users.add(path.name)
            assert not any(name.split(".")[0] == "afd" for name in names), path
    assert users == {"tensor.py"}


PURE = ("handshake", "layout", "session", "spin", "topology", "window", "wire", "types", "errors", "config")
EFFECTS = {"socket", "threading", "time", "random", "secrets", "os", "select", "mmap", "logging"}


@pytest.mark.parametrize("module", PURE)
def test_decisions_import_no_effects(module: str) -> None:
    import ast
    from pathlib import Path

    tree = ast.parse((Path(stepmesh.__file__).parent / f"{module}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & EFFECTS

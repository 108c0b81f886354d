"""Environment, messages and arrays of the StepMesh face: pure parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.compat import arrays, message
from stepmesh.compat.arrays import Described
from stepmesh.compat.environment import Environment
from stepmesh.compat.message import Pull, Table, Times
from stepmesh.errors import ConfigError, ProtocolError

ROOT = {"DMLC_PS_ROOT_URI": "10.0.0.1", "DMLC_PS_ROOT_PORT": "8123"}


def test_the_environment_of_a_worker() -> None:
    env = Environment.parse(
        ROOT | {"DMLC_ROLE": "worker", "DMLC_NUM_WORKER": "2", "DMLC_NODE_RANK": "1", "DMLC_GROUP_SIZE": "8",
                "STEPMESH_GPU": "3", "STEPMESH_SECRET": "a key of sixteen bytes", "DMLC_ENABLE_RDMA": "ibverbs"}
    )  # fmt: skip
    assert (env.name, env.num_workers, env.num_servers, env.root_port) == ("worker 1 gpu 3", 2, 1, 8123)
    assert env.key == b"a key of sixteen bytes"
    assert env.is_secret


def test_without_a_secret_the_key_is_the_addresses() -> None:
    one, other = Environment.parse(ROOT), Environment.parse(ROOT | {"DMLC_PS_ROOT_PORT": "8124"})
    assert not one.is_secret
    assert one.key != other.key
    assert len(one.key) >= 16


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"DMLC_ROLE": "boss"}, "DMLC_ROLE=boss"),
        ({"DMLC_PS_ROOT_URI": ""}, "DMLC_PS_ROOT_URI is not set"),
        ({"DMLC_PS_ROOT_PORT": "many"}, "DMLC_PS_ROOT_PORT=many"),
        ({"DMLC_NODE_RANK": "1"}, "DMLC_NODE_RANK=1"),
        ({"STEPMESH_GPU": "1"}, "STEPMESH_GPU=1"),
        ({"STEPMESH_SECRET": "short"}, "shorter than 16"),
        ({"STEPMESH_TRANSPORT": "inproc"}, "STEPMESH_TRANSPORT=inproc"),
        ({"STEPMESH_IN_FLIGHT": "65"}, "STEPMESH_IN_FLIGHT=65"),
        ({"STEPMESH_TIMEOUT": "nan"}, "STEPMESH_TIMEOUT=nan"),
    ],
)
def test_wrong_variables_are_named(change: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Environment.parse(ROOT | change)


ARRAYS: list[Any] = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.zeros((0, 5), np.int64),
    np.array(7, np.int8),
    np.arange(12, dtype=np.uint16).reshape(3, 4)[:, ::2],
    np.array([True, False]),
]
TENSORS = [
    torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16),
    torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    torch.zeros((0, 5), dtype=torch.int64),
    torch.tensor(7, dtype=torch.int16),
    torch.arange(12, dtype=torch.float64).reshape(3, 4).t(),
    torch.ones(3, requires_grad=True),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("sent", ARRAYS + TENSORS, ids=str)
def test_tensors_survive_a_message(sent: Any) -> None:
    described = arrays.describe(sent)
    table = Table(((5, described), (6, described)), (Pull(9, 100),))
    memory = np.full(message.message_bytes(table) + 77, 0xFF, np.uint8)
    message.pack(memory, table, [arrays.read(sent)] * 2, Times(1, 2, 3, 4))
    got, contents, times = message.unpack(memory)
    assert (got, times) == (table, Times(1, 2, 3, 4))
    for content in contents:
        tensor = arrays.view(content, described)
        assert type(tensor) is type(sent.detach() if isinstance(sent, torch.Tensor) else sent)
        assert (tensor.dtype, tuple(tensor.shape)) == (sent.dtype, tuple(sent.shape))
        assert arrays.read(tensor).tobytes() == arrays.read(sent).tobytes()
        assert arrays.read(tensor).ctypes.data == content.ctypes.data or content.size == 0  # no copy


@pytest.mark.parametrize("target", ARRAYS + TENSORS, ids=str)
def test_writing_fills_the_first_bytes(target: Any) -> None:
    target = target.copy() if isinstance(target, np.ndarray) else target.detach().clone()
    before = arrays.read(target).copy()
    content = np.zeros(before.size // 2, np.uint8)
    arrays.write(target, content)
    after = arrays.read(target)
    assert not after[: content.size].any()
    np.testing.assert_array_equal(after[content.size :], before[content.size :])
    with pytest.raises(ConfigError, match="do not fit"):
        arrays.write(target, np.zeros(before.size + 1, np.uint8))


def test_a_strided_target_is_written_in_place() -> None:
    whole = np.zeros((4, 4), np.int32)
    arrays.write(whole[:, 1], arrays.read(np.arange(4, dtype=np.int32)))
    np.testing.assert_array_equal(whole[:, 1], np.arange(4))
    tensor = torch.zeros(4, 4, dtype=torch.bfloat16)
    arrays.write(tensor[:, 2], arrays.read(torch.arange(4, dtype=torch.bfloat16)))
    assert torch.equal(tensor[:, 2], torch.arange(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("buffer", [np.zeros((4, 6), np.float32), torch.zeros(4, 6)], ids=["numpy", "torch"])
@pytest.mark.parametrize("sent", [np.ones(3, np.int32), torch.ones(2, 3)], ids=["numpy", "torch"])
def test_parts_of_a_buffer(buffer: Any, sent: Any) -> None:
    flat = arrays.part(buffer, 1, 2)
    arrays.write(flat, arrays.read(sent))
    got = arrays.reshape(flat, arrays.describe(sent))
    assert arrays.read(got).tobytes() == arrays.read(sent).tobytes()
    assert not np.asarray(buffer[:2]).any()
    assert np.asarray(buffer[2:]).any()
    with pytest.raises(ConfigError, match="7 equal parts"):
        arrays.part(buffer, 0, 7)
    with pytest.raises(ConfigError, match="contiguous"):
        arrays.part(buffer.T, 0, 2)


@pytest.mark.parametrize(
    "wrong", [[1, 2], np.array([object()]), torch.zeros(1, dtype=torch.complex64), np.zeros([1] * 17)]
)
def test_what_cannot_be_sent_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        arrays.describe(wrong)


@pytest.mark.parametrize(
    "described",
    [("torch", "os.system", (1,)), ("numpy", "O", (1,)), ("numpy", "no", (1,)), ("numpy", "<f4", (-1,)),
     ("numpy", "<f4", (1.5,)), ("torch", "float32", (1,) * 17)],
)  # fmt: skip
def test_descriptions_that_no_tensor_has(described: Any) -> None:
    with pytest.raises(ValueError):
        Described.of(*described)


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_garbage_is_a_protocol_error(data: bytes, size: int) -> None:
    memory = np.frombuffer(size.to_bytes(4, "little") + bytes(36) + data, np.uint8)
    try:
        table, contents, _ = message.unpack(memory)
    except ProtocolError:
        return
    assert len(table.tensors) == len(contents)


@pytest.mark.parametrize(
    "text",
    ['{"a":1}', "[[],[]", "[[[1]],[]]", '[[[1,"numpy","<f4",[9999]]],[]]', '[[[-1,"numpy","<f4",[1]]],[]]',
     '[[[1,"numpy","<f4","x"]],[]]', "[[],[[1,-1]]]", "[1,2]"],
)  # fmt: skip
def test_tables_that_lie_are_a_protocol_error(text: str) -> None:
    memory = np.zeros(4096, np.uint8)
    memory[:4] = np.frombuffer(len(text).to_bytes(4, "little"), np.uint8)
    memory[40 : 40 + len(text)] = np.frombuffer(text.encode(), np.uint8)
    with pytest.raises(ProtocolError):
        message.unpack(memory)


def test_an_answer_always_fits_what_was_asked_for() -> None:
    pulls = tuple(Pull((1 << 64) - 1 - i, 6400) for i in range(20))
    shape = (1,) * 15 + (1600,)
    answer = Table(tuple((pull.key, Described("torch", "float32", shape)) for pull in pulls))
    assert message.message_bytes(answer) <= message.answer_bytes(pulls)

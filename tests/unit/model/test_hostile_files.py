"""Model files whose counts and sizes lie: refused in one line, in little time and memory, whatever they claim."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.model.presets import PRESETS
from tests.fakes.forks import Forks

MEMORY_BYTES = 1 << 30
CPU_S = 10
_ANSWER = f"""
import resource
from afd.errors import ModelError
from afd.model.loading import resolve_model
from afd.model.tokenizer_files import load_tokenizer

def answer(path):
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
    resource.setrlimit(resource.RLIMIT_CPU, ({CPU_S}, {CPU_S}))
    try:
        load_tokenizer(resolve_model(path))
    except ModelError as error:
        return f"refused: {{error}}"
    return "served"
"""

LLAMA, QWEN3_MOE = dict(PRESETS["llama-tiny"]), dict(PRESETS["qwen3-moe-tiny"])
STRING, ARRAY, U8, U32, F32 = 8, 9, 0, 4, 6


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(*keys: bytes, num_keys: int | None = None, num_tensors: int = 0, tail: bytes = b"") -> bytes:
    count = len(keys) if num_keys is None else num_keys
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(keys) + tail


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = _key("general.architecture", STRING, _text("llama"))


def _block_count(count: int) -> bytes:
    sizes = {"embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 64, "context_length": 64,
             "vocab_size": 32}  # fmt: skip
    keys = [_key(f"llama.{name}", U32, struct.pack("<I", size)) for name, size in sizes.items()]
    keys.append(_key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)))
    keys.append(_key("llama.block_count", 10, struct.pack("<Q", count)))
    return _gguf(ARCHITECTURE, *keys)


def _alignment(kind: int, value: bytes) -> bytes:
    return _gguf(ARCHITECTURE, _key("general.alignment", kind, value))


def _array(kind: int, count: int, data: bytes = b"") -> bytes:
    return _gguf(ARCHITECTURE, _key("a", ARRAY, struct.pack("<IQ", kind, count) + data))


GGUF_FILES: dict[str, tuple[bytes, int, str]] = {
    "ten million blocks": (_block_count(10**7), 0, "llama.block_count: 10000000 is more than 1000"),
    "2^63 blocks": (_block_count(1 << 63), 0, "llama.block_count: 9223372036854775808 is more than 1000"),
    "twenty million arrays": (_array(ARRAY, 20_000_000), 256 << 20, "array of type 9"),
    "2^63 keys": (_gguf(num_keys=1 << 63), 256 << 20, "keys are more than the file holds"),
    "2^63 tensors": (_gguf(ARCHITECTURE, num_tensors=1 << 63), 256 << 20, "tensors are more than the file holds"),
    "four million tensors": (_gguf(ARCHITECTURE, num_tensors=4_000_000), 256 << 20, "tensors are more than"),
    "an array of 256 MiB": (_array(U8, 255 << 20), 256 << 20, "array items are more than"),
    "2^63 strings": (_array(STRING, 1 << 63), 256 << 20, "array items are more than the file holds"),
    "thirty million strings": (_array(STRING, 30_000_000), 256 << 20, "array items are more than"),
    "a string of 2^63": (_gguf(struct.pack("<Q", 1 << 63), num_keys=1), 1 << 20, "bytes are more than are left"),
    "alignment as text": (_alignment(STRING, _text("x")), 0, "general.alignment is 'x', expected a power of two"),
    "alignment as a list": (_alignment(ARRAY, struct.pack("<IQ", U8, 0)), 0, "general.alignment is array"),
    "alignment nan": (_alignment(F32, struct.pack("<f", float("nan"))), 0, "general.alignment is nan"),
    "alignment inf": (_alignment(F32, struct.pack("<f", float("inf"))), 0, "general.alignment is inf"),
    "a key twice": (_gguf(ARCHITECTURE, ARCHITECTURE), 0, "key 'general.architecture' stands twice"),
    "nothing": (b"", 0, "not a GGUF file"),
}


def _header(tensors: str) -> bytes:
    return struct.pack("<Q", len(tensors)) + tensors.encode()


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(text)


def _shard(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        _index(folder, json.dumps({"weight_map": {"t": name}}))

    return write


def _weights(tensors: Callable[[], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(_header(tensors())) and None


def _many_tensors() -> str:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(entry % i for i in range(600_000)) + "}"


def _config(config: dict[str, Any], **changes: Any) -> Callable[[Path], None]:
    text = json.dumps({**config, **changes})
    return lambda folder: (folder / "config.json").write_text(text) and None


def _raw_config(text: Callable[[], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text()) and None


DEEP = 100_000
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million layers": (_config(LLAMA, num_hidden_layers=10**6), "num_hidden_layers: 1000000 is more than 1000"),
    "a thousand layers": (_config(LLAMA, num_hidden_layers=1000), "missing tensor model.embed_tokens.weight"),
    "10^9 experts": (_config(QWEN3_MOE, num_experts=10**9), "num_experts: 1000000000 is more than 10000"),
    "many layers of experts": (_config(QWEN3_MOE, num_experts=10**4, num_hidden_layers=1000), "(and more)"),
    "10^400": (_raw_config(lambda: json.dumps({**LLAMA, "rope_theta": 10**400})), "expected a finite number"),
    "a deep config": (_raw_config(lambda: '{"a":' * DEEP), "not JSON"),
    "a deep value": (_raw_config(lambda: "[" * DEEP + "]" * DEEP), "config.json"),
    "a deep header": (_weights(lambda: '{"a":' * DEEP + "}" * DEEP), "malformed safetensors header: RecursionError"),
    "a deep index": (lambda folder: _index(folder, '{"a":' * DEEP), "not JSON"),
    "an endless shape": (
        _weights(lambda: '{"t":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'), "malformed safetensors header",
    ),
    "600,000 tensors": (_weights(_many_tensors), "more than 400000 tensors"),
    "a folder as shard": (_shard("sub"), "sub: not a regular file"),
    "a long shard name": (_shard("x" * 5000), "cannot open"),
    "a shard name with lines": (_shard("a\nb"), "missing, although"),
}  # fmt: skip


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(_ANSWER) as forks:
        yield forks


def _answer(forks: Forks, path: Path) -> str:
    answer = forks.ask(str(path))
    assert len(answer) < 3000
    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("name", GGUF_FILES)
def test_a_gguf_file_that_claims_too_much(forks: Forks, tmp_path: Path, name: str) -> None:
    """Sparse where the file is large."""
    data, size, message = GGUF_FILES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    if size:
        with path.open("r+b") as file:
            file.truncate(size)
    assert message in _answer(forks, path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_claims_too_much(forks: Forks, tmp_path: Path, name: str) -> None:
    write, message = FOLDERS[name]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(_header("{}"))
    write(tmp_path)
    assert message in _answer(forks, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_an_honest_model_is_within_the_limits(forks: Forks) -> None:
    assert _answer(forks, Path("smollm2-135m-instruct")) == "served"

"""Weight sources: a slice equals the slice of the whole, and broken files are named."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from afd.errors import ModelError
from afd.model.inventory import inventory
from afd.model.loading import resolve_model
from afd.model.weights.dummy import DummySource
from afd.model.weights.gguf import GgufSource
from afd.model.weights.safetensors import SafetensorsSource
from afd.model.weights.source import TensorSource

ARRAYS = {
    "vector": np.arange(48, dtype=np.float32),
    "matrix": np.arange(96 * 64, dtype=np.float32).reshape(96, 64) % 251 - 100,
    "experts": np.arange(4 * 8 * 64, dtype=np.float32).reshape(4, 8, 64) % 127 - 60,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TensorSource, dict[str, np.ndarray]]]:
    """Each source with its tensors read whole."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(ARRAYS, folder / "model.safetensors")
    dummy = DummySource(inventory(resolve_model("dummy:step3-tiny").spec))
    gguf_path = _write_gguf(folder / "model.gguf")
    result: dict[str, tuple[TensorSource, dict[str, np.ndarray]]] = {}
    for source in (SafetensorsSource(folder), dummy, GgufSource(gguf_path)):
        wholes = {name: np.asarray(source.read(name).array) for name in source.tensors}
        result[type(source).__name__] = source, wholes
    return result


def _write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("some.words", ["naïve", "", "日本"])
    writer.add_array("some.numbers", [1, 2, 3])
    for kind in ("F32", "F16", "Q8_0", "Q4_1", "Q4_0"):
        data = gguf.quantize(ARRAYS["matrix"], gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["SafetensorsSource", "DummySource", "GgufSource"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_slice_is_the_slice_of_the_whole(
    sources: dict[str, tuple[TensorSource, dict[str, np.ndarray]]], kind: str, data: st.DataObject
) -> None:
    source, wholes = sources[kind]
    name = data.draw(st.sampled_from(sorted(wholes)))
    whole = wholes[name]
    num_slices = data.draw(st.integers(0, whole.ndim))
    slices = []
    for size in whole.shape[:num_slices]:
        start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        slices.append(slice(start, stop))
    got = source.read(name, tuple(slices)).array
    np.testing.assert_array_equal(got, whole[tuple(slices)])


def test_whole_tensors_are_what_was_written(
    sources: dict[str, tuple[TensorSource, dict[str, np.ndarray]]],
) -> None:
    _, wholes = sources["SafetensorsSource"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(wholes[name], array)
    _, quantised = sources["GgufSource"]
    for name, tolerance in (("F32", 0.0), ("F16", 0.1), ("Q8_0", 0.7), ("Q4_1", 9.0)):
        assert np.abs(quantised[name] - ARRAYS["matrix"]).max() <= tolerance, name


def test_gguf_header_against_the_gguf_package(
    sources: dict[str, tuple[TensorSource, dict[str, np.ndarray]]],
) -> None:
    source, wholes = sources["GgufSource"]
    assert isinstance(source, GgufSource)
    reader = gguf.GGUFReader(source.files[0])
    for key in ("general.architecture", "llama.block_count", "some.words", "some.numbers"):
        np.testing.assert_array_equal(source.metadata[key], reader.fields[key].contents(), key)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(wholes[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type))


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    tensors = inventory(resolve_model("dummy:llama-tiny").spec)
    first, again, other = DummySource(tensors), DummySource(tensors[::-1]), DummySource(tensors, seed=1)
    q, k = first.read("q.0").array, first.read("q.1").array
    np.testing.assert_array_equal(q, again.read("q.0").array)
    assert not np.array_equal(q, other.read("q.0").array)
    assert not np.array_equal(q, k)
    assert abs(q.std() * np.sqrt(q.shape[1]) - 1) < 0.05


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    for shard, names in (("a.safetensors", ["vector"]), ("b.safetensors", ["matrix", "experts"])):
        save_file({name: ARRAYS[name] for name in names}, tmp_path / shard)
    index = {"weight_map": {"vector": "a.safetensors", "matrix": "b.safetensors", "experts": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsSource(tmp_path)
    assert [file.name for file in source.files] == ["a.safetensors", "b.safetensors"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(source.read(name).array, array)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: missing, although"):
        SafetensorsSource(tmp_path)


def _shards(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str]) -> SafetensorsSource:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = {"weight_map": {tensor: f"{shard}.safetensors" for tensor, shard in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return SafetensorsSource(folder)


@pytest.mark.parametrize("named", ["a", "b"])
def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(tmp_path: Path, named: str) -> None:
    shared = {"vector": ARRAYS["vector"]}
    shards = {"a": shared, "b": {**shared, "matrix": ARRAYS["matrix"]}}
    source = _shards(tmp_path, shards, {"vector": named, "matrix": "b", **({"other": "a"} if named == "b" else {})})
    assert source.tensors["vector"].file == str(tmp_path / f"{named}.safetensors")
    np.testing.assert_array_equal(source.read("vector").array, ARRAYS["vector"])


def test_two_shards_that_hold_other_numbers_under_one_name_are_an_error(tmp_path: Path) -> None:
    shards = {"a": {"vector": ARRAYS["vector"]}, "b": {"vector": ARRAYS["vector"] + 1, "matrix": ARRAYS["matrix"]}}
    with pytest.raises(ModelError, match=r"b\.safetensors: tensor vector is also in .*a\.safetensors, with other"):
        _shards(tmp_path, shards, {"vector": "a", "matrix": "b"})


def test_a_tensor_that_the_index_does_not_name_is_there_but_not_listed(tmp_path: Path) -> None:
    source = _shards(tmp_path, {"a": {"vector": ARRAYS["vector"], "matrix": ARRAYS["matrix"]}}, {"vector": "a"})
    assert source.tensors["vector"].listed and not source.tensors["matrix"].listed
    np.testing.assert_array_equal(source.read("matrix").array, ARRAYS["matrix"])


def test_one_whole_file_counts_before_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    save_file({"vector": ARRAYS["vector"] + 2}, tmp_path / "model.safetensors")
    source = _shards(tmp_path, {"a": {"vector": ARRAYS["vector"]}}, {"vector": "a"})
    np.testing.assert_array_equal(source.read("vector").array, ARRAYS["vector"] + 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [("not json", "not JSON"), ("{}", "not a safetensors index"),
     ('{"weight_map": {"t": "../x.safetensors"}}', "lies outside the folder")],
)  # fmt: skip
def test_a_broken_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        SafetensorsSource(tmp_path)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(fraction=st.floats(0.0, 0.999))
def test_every_truncation_of_safetensors_is_an_error(tmp_path_factory: pytest.TempPathFactory, fraction: float) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    path = folder / "model.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*truncated|model\.safetensors: malformed"):
        SafetensorsSource(folder)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fraction=st.floats(0.0, 0.999))
def test_every_truncation_of_gguf_is_an_error(
    sources: dict[str, tuple[TensorSource, dict[str, np.ndarray]]], tmp_path_factory: pytest.TempPathFactory,
    fraction: float,
) -> None:  # fmt: skip
    whole = sources["GgufSource"][0].files[0].read_bytes()
    path = tmp_path_factory.mktemp("truncated") / "m.gguf"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ModelError, match=r"m\.gguf: (truncated|not a GGUF file)"):
        GgufSource(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_gguf_header_never_escapes_as_another_error(
    sources: dict[str, tuple[TensorSource, dict[str, np.ndarray]]], tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:  # fmt: skip
    damaged = bytearray(sources["GgufSource"][0].files[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(damaged))
    try:
        GgufSource(path)
    except ModelError as error:
        assert str(path) in str(error)


def test_a_shape_that_its_bytes_do_not_hold_is_named(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 32]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(ModelError, match=r"tensor t: 32 bytes do not hold shape \[4, 4\] of F32"):
        SafetensorsSource(tmp_path)

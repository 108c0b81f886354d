"""The files of a model folder: inside it or refused, regular or refused, for every reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from afd.errors import ModelError
from afd.model.loading import resolve_model
from afd.model.model_files import find_file, json_object, read_file, read_json_object, read_text
from afd.model.presets import PRESETS

MakeFolder = Callable[..., Path]


def test_what_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes("é\r\nb\rc\n".encode())
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_text(tmp_path, "a.jinja", 100) == "é\nb\nc\n"
    assert read_json_object(tmp_path, "a.json") == {"a": 1}
    assert read_file(tmp_path, "none", 1) is None and find_file(tmp_path, "a.json/none") is None


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """As a mounted ConfigMap has them."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "config.json").write_text("{}")
    (tmp_path / "config.json").symlink_to("..data/config.json")
    assert find_file(tmp_path, "config.json") == tmp_path / "..data" / "config.json"


def test_a_hub_caches_snapshot_is_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    (snapshot / "additional_chat_templates" / "t.jinja").symlink_to("../../../blobs/x")
    (snapshot / "escape").symlink_to("../../secret")
    (tmp_path / "models--a" / "secret").write_text("s")
    shown = tmp_path / "shown"
    shown.symlink_to(snapshot)
    for folder in (snapshot, shown):
        assert find_file(folder, "config.json") == blobs / "x"
        assert read_text(folder, "additional_chat_templates/t.jinja", 10) == "{}"
        with pytest.raises(ModelError, match="lies outside the model's folder"):
            find_file(folder, "escape")


@pytest.mark.parametrize("name", ["link", "../secret", "folder/link", "linked/secret"])
def test_files_outside_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to("../secret")
    (folder / "folder" / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to("..")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        read_file(folder, name, 10)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(ModelError, match="not a regular file"):
            read_file(tmp_path, name, 10)


def test_links_to_nothing_loops_and_impossible_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").symlink_to("none")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nothing", "loop", "x" * 5000, "a\0b"):
        with pytest.raises(ModelError):
            find_file(tmp_path, name)


def test_sizes_and_contents_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff" * 11)
    with pytest.raises(ModelError, match="larger than 10 bytes"):
        read_file(tmp_path, "f", 10)
    with pytest.raises(ModelError, match="not UTF-8"):
        read_text(tmp_path, "f", 11)
    for data in (b"[1]", b"{", b"\xff", b"[" * 200_000):
        with pytest.raises(ModelError):
            json_object(tmp_path, data)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
             "tokenizer.json"]
)  # fmt: skip
def test_every_reader_of_a_folder_refuses_files_outside_it(make_folder: MakeFolder, tmp_path: Path, name: str) -> None:
    path = make_folder("llama-tiny")
    inside = path / name
    outside = tmp_path / "outside"
    if inside.exists():
        inside.rename(outside)
    else:
        outside.write_text('{"weight_map": {}}')
    inside.symlink_to(outside)
    with pytest.raises(ModelError, match=f"{name}: lies outside the model's folder"):
        resolve_model(str(path))
    inside.unlink()
    os.mkfifo(inside)
    with pytest.raises(ModelError, match=f"{name}: not a regular file"):
        resolve_model(str(path))


def test_shards_are_looked_at_too(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = make_folder("llama-tiny")
    (path / "model.safetensors").rename(tmp_path / "shard")
    (path / "shard.safetensors").symlink_to("../shard")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "shard.safetensors"}}')
    with pytest.raises(ModelError, match=r"shard\.safetensors: lies outside the model's folder"):
        resolve_model(str(path))


def test_end_tokens_are_those_of_every_place(make_folder: MakeFolder) -> None:
    path = make_folder("llama-tiny")
    inner = PRESETS["llama-tiny"]
    config = {"model_type": "llava", "text_config": {**inner, "eos_token_id": 4}, "eos_token_id": [3, 4]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert resolve_model(str(path)).spec.eos_token_ids == (3, 4, 9)

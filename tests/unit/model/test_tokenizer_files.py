"""Tokenizer files: what they name as end tokens, and what is refused with the file's name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from afd.config import ModelConfig
from afd.errors import ModelError
from afd.gateway.served_model import load_served_model
from afd.model.loading import resolve_model
from afd.model.tokenizer_files import load_tokenizer, read_gguf_tokenizer, read_tokenizer_folder
from tests.fakes.text_model import byte_tokenizer

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(make_folder: MakeFolder) -> Path:
    """A llama whose configuration names no end token, with a byte-level tokenizer."""
    path = make_folder("llama-tiny", lambda config: config.pop("eos_token_id", None))
    (path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return path


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def test_end_tokens_are_the_union_of_all_places(folder: Path) -> None:
    end, other = byte_tokenizer().token_to_id("a"), byte_tokenizer().token_to_id("b")
    write(folder, "generation_config.json", {"eos_token_id": [5, 6]})
    write(folder, "tokenizer_config.json", {"eos_token": "a"})
    assert load_served_model(ModelConfig(name=str(folder))).eos_token_ids == (5, 6, end)
    write(folder, "tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": "a"}})
    assert load_served_model(ModelConfig(name=str(folder))).eos_token_ids == (5, 6, end)
    write(folder, "tokenizer_config.json", {})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "b"}})
    assert load_served_model(ModelConfig(name=str(folder))).eos_token_ids == (5, 6, other)


def test_a_model_without_any_end_token_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_served_model(ModelConfig(name=str(folder))).eos_token_ids == ()
    assert "no file of the model names an end token" in caplog.text


def test_a_broken_template_leaves_the_rest_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    model = load_served_model(ModelConfig(name=str(folder)))
    assert model.template is None and "not valid Jinja" in model.template_problem
    assert model.need_tokenizer("prompt").encode("hello")
    assert "chat is not served" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": 1}}}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "chat_template"),
        ("chat_template.json", '{"chat_template": [5]}', "chat_template.json: chat_template"),
        ("special_tokens_map.json", "[]", "expected a JSON object"),
        ("added_tokens.json", '{"a": "x"}', "tokenizer_config.json, or a file of tokens"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(resolve_model(str(folder)))


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "chat_template.json", "additional_chat_templates/x.jinja"]
)  # fmt: skip
def test_files_outside_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        read_tokenizer_folder(folder)


def gguf_metadata(**more: object) -> dict[str, object]:
    tokens = ["a", "b", "ab", "<|im_end|>", "<|eot_id|>", "x", "<|end|>", "<|return|>", "<|call|>"]
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["a b"],
                "token_type": [1, 1, 1, 3, 3, 1, 3, 3, 3]}  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in {**metadata, **more}.items() if value is not None}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (3, 4, 7, 8)),  # <|end|> ends a message only, where there is <|return|>
        ({"eos_token_id": 5, "eot_token_id": 0, "eom_token_id": 1}, (5, 0, 1, 3, 4, 7, 8)),
        ({"tokens": ["a", "b", "ab", "<|end|>"], "eos_token_id": 2}, (2, 3)),
        ({"tokens": ["a", "b", "ab"]}, ()),
        ({"tokens": ["a", "b", "ab"], "eos_token_id": 2**32 - 1, "eot_token_id": 1}, (1,)),
    ],
)
def test_end_tokens_of_a_gguf_file(more: dict[str, object], expected: tuple[int, ...]) -> None:
    assert read_gguf_tokenizer(gguf_metadata(**more), Path("m.gguf")).eos_token_ids == expected


def test_templates_of_a_gguf_file_by_name() -> None:
    named = {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T", "tokenizer.chat_templates": ["x"]}
    files = read_gguf_tokenizer({**gguf_metadata(bos_token_id=0), **named}, Path("m.gguf"))
    assert files.chat_templates == {"tool_use": "T", "default": "D"}
    assert files.special_tokens == {"bos_token": "a"}


@pytest.mark.parametrize("more", [{"merges": ["a z"]}, {"eos_token_id": "a"}, {"pre": "other"}, {"merges": [5]}])
def test_a_broken_gguf_vocabulary_is_named(more: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"m\.gguf: "):
        read_gguf_tokenizer(gguf_metadata(**more), Path("m.gguf"))


def test_a_folder_with_another_kind_of_tokenizer_says_what_to_do(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    load_served_model(ModelConfig(name=str(folder)))
    assert "tokenizer.json" not in caplog.text
    (folder / "tokenizer.model").write_bytes(b"x")
    assert load_served_model(ModelConfig(name=str(folder))).tokenizer is None
    assert "tokenizer.model is not read, and there is no tokenizer.json" in caplog.text


def test_names_in_files_do_not_reach_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token = {"content": "<x>", "special": True, "\x1b[31mred": 1}
    config = {"added_tokens_decoder": {"900": token}, "eos_token": {"__type": "AddedToken", **token}}
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer_folder(tmp_path).special_tokens == {"eos_token": "<x>"}
    assert capfd.readouterr() == ("", "")

"""Tokenizer folders and chat templates side by side with transformers: what it reads, adds and renders, we do too."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from afd.errors import RequestError
from afd.gateway.templating import ChatTemplate
from afd.model.tokenizer_files import read_tokenizer_folder
from tests.oracles.tokenizer_folders import BASES, TEXTS, VARIATIONS, byte_level, files_of, qwen_like, write_folder

transformers = pytest.importorskip("transformers")
QWEN = {"model_type": "qwen3"}
QWEN_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": "<unk>", "bos_token": None}
CASES = list(itertools.product(BASES, VARIATIONS))


def theirs_of(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def compare(theirs: Any, folder: Path) -> None:
    """Tokens of every text, the text of the tokens, the added tokens and the special ones."""
    ours = read_tokenizer_folder(folder)
    for text, special in itertools.product(TEXTS, (True, False)):
        expected = theirs.encode(text, add_special_tokens=special)
        found = ours.tokenizer.encode(text, add_special_tokens=special).ids
        assert found == expected, (folder.name, text, special)
        for skip in (True, False):
            decoded = ours.tokenizer.decode(found, skip_special_tokens=skip)
            assert decoded == theirs.decode(expected, skip_special_tokens=skip), (folder.name, text, skip)
    assert {i: repr(token) for i, token in ours.tokenizer.get_added_tokens_decoder().items()} == {
        i: repr(token) for i, token in theirs.added_tokens_decoder.items()
    }, folder.name
    assert dict(ours.special_tokens) == theirs.special_tokens_map, folder.name
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,)), folder.name


@pytest.mark.parametrize("base", BASES)
def test_texts_have_the_same_tokens(base: str, tmp_path: Path) -> None:
    for variation in VARIATIONS:
        folder = write_folder(tmp_path / variation, files_of(base, variation))
        compare(theirs_of(folder), folder)


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"add_prefix_space": False}])
@pytest.mark.parametrize(
    ("base", "model_type"),
    [("byte_fallback", "llama"), ("metaspace", "deepseek_v3"), ("byte_level", "llama"), ("byte_fallback", "step3_vl")],
)
def test_llama_tokenizers_have_a_pipeline_of_their_own(
    base: str, model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever tokenizer.json says; but for byte-level ones, and the model types of which transformers knows better."""
    for variation in VARIATIONS:
        files = files_of(base, variation)
        files.setdefault("tokenizer_config.json", {}).update({"tokenizer_class": "LlamaTokenizerFast", **settings})
        folder = write_folder(tmp_path / variation, {**files, "config.json": {"model_type": model_type}})
        compare(transformers.AutoTokenizer.from_pretrained(folder), folder)


def test_qwens_class_and_its_file_say_the_same(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"tokenizer.json": json.loads(qwen_like().to_str()), "config.json": QWEN})
    write_folder(folder, {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", **QWEN_TOKENS}})
    compare(transformers.AutoTokenizer.from_pretrained(folder), folder)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 100


PLACES: dict[str, dict[str, Any]] = {
    "none": {},
    "in the config": {"tokenizer_config.json": {"chat_template": "C"}},
    "a list": {"tokenizer_config.json": {"chat_template": [
        {"name": "default", "template": "LD"}, {"name": "tool_use", "template": "LT"},
        {"name": "rag", "template": "LR"},
    ]}},
    "a list without tools": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "LD"}]}},
    "a list without default": {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "LR"}]}},
    "an object": {"tokenizer_config.json": {"chat_template": {"default": "OD", "tool_use": "OT"}}},
    "a file": {"chat_template.jinja": "F\n"},
    "a file with other line ends": {"chat_template.jinja": "a{% if true %}\r\nb\r\n{% endif %}\rc"},
    "a file over the config": {"chat_template.jinja": "F", "tokenizer_config.json": {"chat_template": "C"}},
    "files": {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "FT"},
    "more files alone": {"additional_chat_templates/tool_use.jinja": "FT",
                         "tokenizer_config.json": {"chat_template": "C"}},
    "a file over a list": {"chat_template.jinja": "F", "tokenizer_config.json": {"chat_template": [
        {"name": "default", "template": "LD"}, {"name": "tool_use", "template": "LT"}
    ]}},
    "special tokens": {"chat_template.jinja": "{{ bos_token }}{{ pad_token is defined }}{{ image_token }}",
                       "tokenizer_config.json": {"bos_token": "<s>", "image_token": "</s>"}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_transformers_finds_them(place: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"tokenizer.json": json.loads(byte_level().to_str()), **PLACES[place]})
    theirs, files = theirs_of(folder), read_tokenizer_folder(folder)
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, [{"type": "function", "function": {"name": "get", "parameters": {}}}]):
        try:
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        except ValueError:
            expected = None
        if not files.chat_templates:
            assert expected is None
        else:
            assert rendered(ChatTemplate(files.chat_templates, files.special_tokens), messages, tools) == expected


def test_a_template_beside_a_processor_is_the_last_resort(tmp_path: Path) -> None:
    tokenizer = json.loads(byte_level().to_str())
    folder = write_folder(tmp_path, {"tokenizer.json": tokenizer, "chat_template.json": {"chat_template": "P"}})
    assert read_tokenizer_folder(folder).chat_templates == {"default": "P"}
    write_folder(tmp_path, {"tokenizer_config.json": {"chat_template": "C"}})
    assert read_tokenizer_folder(folder).chat_templates == {"default": "C"}


def rendered(template: ChatTemplate, messages: list[Any], tools: list[Any] | None, **options: Any) -> str | None:
    """None when the template refuses."""
    try:
        return template.render(messages, max_chars=100_000, tools=tools, **options)
    except RequestError:
        return None


VALUES = [
    "messages", "{'b': 'é<>&', 'a': [1, 2.5, none, true]}", "tools", "1e300 * 10", "'日\\u2028'", "()", "7",
    "{'b': {'d': 1, 'c': 2}, 'a': {}}",
]  # fmt: skip
TO_JSON = [
    "tojson", "tojson(indent=2)", "tojson(true)", "tojson(false, 2)", "tojson(ensure_ascii=true)",
    "tojson(separators=(',', ':'))", "tojson(sort_keys=true)", "tojson(indent='\t', sort_keys=true)",
    "tojson(false, none, (', ', ': '), true)", "tojson(4, 4)", "tojson(nothing=1)", "tojson(indent=0)",
]  # fmt: skip
CONSTRUCTS = [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{%- for m in messages -%}\n  {%- generation -%}\n {{ m.content }} {%- endgeneration -%}\n{%- endfor -%}",
    "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}",
    "{% generation %}never closed",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% if loop.last %}{% break %}"
    "{% endif %}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% if false %}{{ raise_exception('no') }}{% endif %}ok",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now(1) }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ namespace({'a': 1}).a }}{{ namespace(self=2).self }}",
    "{{ dict(a=1, b=2) }}{{ dict([('c', 3)]) }}{{ dict.fromkeys(['a', 'b'], 1) }}{{ dict(messages[0]) | length }}",
    "{{ dict.mro() }}",
    "{{ dict is mapping }}{{ dict is callable }}",
    "  {% if true %}\n    a\n  {% endif %}\nb\n",
    "{% macro say(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ say('a') }}{{ say('b', y='?') }}",
    "{% set parts = [] %}{% set _ = parts.append('a') %}{{ parts }}",
    "{% set parts = ['a'] + ['b'] %}{{ parts | join('-') }}{{ parts[::-1] }}",
    "{{ messages[0]['content'] | trim | upper }}{{ messages[0].content.strip().split(' ')[0] }}",
    "{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ messages[-1].content }}{{ messages[0:2] | length }}",
    "{% if tools is defined %}D{% endif %}{% if tools %}T{{ tools | length }}{% endif %}{{ tools is none }}",
    "{% if documents is defined %}D{{ documents }}{% endif %}",
    "{{ unknown }}{{ unknown is defined }}{{ unknown | default('d') }}",
    "{{ unknown.deeper }}",
    "{{ unknown + 'x' }}",
    "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ cls_token is defined }}",
    "{% for m in messages %}{{ m.content is string }}{{ m.content is defined }}{{ m.content is none }}{% endfor %}",
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}({% for k, v in "
    "c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }};{% endfor %}",
    "{% for m in messages %}{% if m.tool_calls %}calls{% endif %}{% if 'tool_calls' in m %}in{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.keys() | list }}{% endfor %}",
    "{{ messages | string }}",
    "{% set a, b = 1, 2 %}{{ a ~ b }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1 / 3 }}",
    "{{ 'a' if 1 > 2 else 'b' }}{{ 1 in [1] }}{{ not true }}",
    "{{ '%s-%d' | format('a', 3) }}{{ '{}'.format(1) }}",
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ range(5) | list }}{{ range(100001) | length }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% filter upper %}abc{% endfilter %}{% call(x) nothing() %}{% endcall %}",
    "{% filter upper %}abc{% endfilter %}",
    "{% raw %}{{ not }}{% endraw %}{# comment #}x{#- y -#}  z",
    "{{ '<b>' }}{{ '<b>' | e }}{{ '<b>' | safe }}",
    "{% set x %}block {{ 1 }}{% endset %}{{ x }}",
    "{{ lipsum is defined }}{{ cycler is defined }}{{ joiner is defined }}{{ self is defined }}",
    "{{ [3, 1, 2] | sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1, 2] | unique | list }}{{ 'a b' | title }}",
    "{{ 'x' | indent(2, true) }}{{ 'abc' | replace('b', 'd') }}{{ 3.14159 | round(2) }}{{ [1, 2] | sum }}",
    "{{ enable_thinking }}{{ enable_thinking is defined and enable_thinking }}",
    "{% trans %}x{% endtrans %}",
    "{% do [].append(1) %}",
    "{% for m in messages recursive %}{{ loop.depth }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{{ messages[0].content[0] }}{{ messages[0].content[:3] }}{{ messages[9] }}",
    "{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 'a' 'b' }}{{ 'a' < 'b' }}",
    "{{ '\\ud800' }}",
] + ["{{ " + value + " | " + call + " }}" for value in VALUES for call in TO_JSON]  # fmt: skip

TOOLS = [{"type": "function", "function": {"name": "get", "description": "é", "parameters": {"type": "object"}}}]
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"city": "Pâris", "n": [1, 2.5, None]}}}
]
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
    ([{"role": "user", "content": " Hi there \n"}], None),
    ([{"role": "system", "content": "é"}, {"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "<"},
      {"role": "user", "content": ""}], TOOLS),
    ([{"role": "user", "content": "w"}, {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning": "r1"},
      {"role": "tool", "tool_call_id": "1", "content": "日"},
      {"role": "assistant", "content": "x", "reasoning_content": "r2", "name": "me"}], TOOLS),
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("templates")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_folder(folder, {"tokenizer.json": json.loads(byte_level().to_str()), "tokenizer_config.json": config})
    return theirs_of(folder)


@pytest.mark.parametrize("source", CONSTRUCTS)
def test_templates_render_the_same(source: str, theirs: Any) -> None:
    template = ChatTemplate({"default": source}, theirs.special_tokens_map)
    for (messages, tools), add_prompt in itertools.product(CONVERSATIONS, (True, False)):
        try:
            expected = theirs.apply_chat_template(
                messages, tools=tools, chat_template=source, add_generation_prompt=add_prompt, tokenize=False,
                enable_thinking=False,
            )  # fmt: skip
            expected.encode()
        except Exception:
            expected = None
        found = rendered(template, messages, tools, add_generation_prompt=add_prompt, extra={"enable_thinking": False})
        assert found == expected, (messages, add_prompt)


def test_the_date_is_todays() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"})
    before = datetime.datetime.now()
    text = template.render([], max_chars=99)
    assert text in {moment.strftime("%d %b %Y") for moment in (before, datetime.datetime.now())}

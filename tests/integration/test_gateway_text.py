"""Text, offsets and log-probabilities of whole answers agree, streamed or not, for each kind of vocabulary."""

import pytest

from afd.gateway.served_model import ServedModel
from afd.gateway.templating import ChatTemplate
from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, saying, text_of
from tests.fakes.text_model import TEMPLATE
from tests.fakes.vocabularies import LIBRARY, OURS

TEXT = "hello 🌊 é 海 ok"
KINDS = list(OURS)


def model_of(kind):
    return ServedModel(
        names=("tiny",),
        vocab_size=OURS[kind].vocab_size,
        max_context=512,
        eos_token_ids=(LIBRARY[kind].token_to_id("</s>"),),
        tokenizer=OURS[kind],
        template=ChatTemplate({"default": TEMPLATE}),
        created=1,
    )


def merged_logprobs(stream):
    merged = {}
    for event in stream:
        for key, values in event["choices"][0]["logprobs"].items():
            merged.setdefault(key, []).extend(values)
    return merged


@async_test
@pytest.mark.parametrize("kind", KINDS)
async def test_offsets_streamed_or_not(kind):
    async with gateway(model_of(kind)) as rig:
        rig.worker.script = saying(model_of(kind), TEXT)
        choice = (await rig.complete("x", logprobs=1, max_tokens=60)).json()["choices"][0]
        stream = events((await rig.complete("x", logprobs=1, max_tokens=60, stream=True)).text)
    assert choice["text"].lstrip() == text_of(stream).lstrip() == TEXT
    assert choice["text"] == text_of(stream)
    assert merged_logprobs(stream) == choice["logprobs"]
    begins = dict(zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True))
    assert set(begins) >= {choice["text"].index(char) for char in "🌊é海"}
    assert max(begins) == len(choice["text"])  # the end token
    assert begins[len(choice["text"])] == "</s>"


@async_test
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_a_prompt_that_ends_inside_a_character(kind, cut):
    tokenizer = OURS[kind]
    wave = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b])) for b in "🌊".encode()
    ]
    head = LIBRARY[kind].encode("hello", add_special_tokens=False).ids
    tail = LIBRARY[kind].encode("hello é!", add_special_tokens=False).ids[len(head) :]
    output = [*wave[cut:], *tail, model_of(kind).eos_token_ids[0]]
    async with gateway(model_of(kind)) as rig:
        rig.worker.script = lambda prompt_ids, idx: output[idx]
        prompt = head + wave[:cut]
        plain = (await rig.complete(prompt, max_tokens=30, logprobs=0)).json()["choices"][0]
        echoed = (await rig.complete(prompt, max_tokens=30, echo=True)).json()["choices"][0]["text"]
        stream = events((await rig.complete(prompt, max_tokens=30, echo=True, stream=True)).text)
        stopped = (await rig.complete(prompt, max_tokens=30, stop="🌊 é")).json()["choices"][0]
    assert plain["text"] == "🌊 é!"
    assert plain["logprobs"]["text_offset"][: 5 - cut] == [0] * (4 - cut) + [1]
    assert echoed == text_of(stream) == "hello🌊 é!"
    assert (stopped["text"], stopped["stop_reason"]) == ("", "🌊 é")


@async_test
@pytest.mark.parametrize("kind", KINDS)
async def test_echo_is_the_prompt_that_came(kind):
    text = " <s>user\nhi</s>  日本 <né>"
    ids = LIBRARY[kind].encode("<s>hello</s>", add_special_tokens=False).ids
    async with gateway(model_of(kind)) as rig:
        rig.worker.script = saying(model_of(kind), "ab")
        by_text = (await rig.complete([text, "hello"], echo=True)).json()["choices"]
        by_ids = (await rig.complete(ids, echo=True)).json()["choices"][0]["text"]
    assert by_text[0]["text"].startswith(text)
    assert by_text[1]["text"].startswith("hello")
    assert by_ids.replace("> ", ">").startswith("<s>hello</s>")


@async_test
@pytest.mark.parametrize("kind", KINDS)
async def test_the_bytes_of_chat_logprobs_make_the_content(kind):
    async with gateway(model_of(kind)) as rig:
        rig.worker.script = saying(model_of(kind), TEXT)
        choice = (await rig.chat(logprobs=True, max_tokens=60)).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert entries[-1]["token"] == "</s>"
    assert (
        b"".join(bytes(entry["bytes"]) for entry in entries).decode().lstrip() == choice["message"]["content"].lstrip()
    )

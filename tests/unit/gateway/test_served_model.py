"""The default model as the gateway sees it, and a model without a tokenizer."""

import pytest

from afd.config import ModelConfig
from afd.errors import RequestError
from afd.gateway.served_model import load_served_model

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2():
    return load_served_model(ModelConfig())


def test_chat_prompt_of_the_default_model(smollm2):
    text = smollm2.template.render([{"role": "user", "content": "What is the capital of France?"}], max_chars=1000)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
    assert ids[:3] == [1, 9690, 198]
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert smollm2.eos_token_ids == (2, 0)  # the file's, and <|endoftext|> by its name
    assert smollm2.max_context == 8192


@pytest.mark.parametrize("text", ["def f(x):\n    return x**2  # 1234", "Zażółć gęślą jaźń 🦆", "日本語 and العربية"])
def test_streamed_text_of_the_default_model(smollm2, text):
    ids = smollm2.tokenizer.encode(text)
    detokenizer = smollm2.tokenizer.detokenizer()
    assert "".join([detokenizer.push([i]) for i in ids] + [detokenizer.flush()]) == text
    assert b"".join(smollm2.tokenizer.token_bytes(i) for i in ids).decode() == text


def test_names(smollm2):
    assert smollm2.names == (SMOLLM2,)
    renamed = load_served_model(ModelConfig(served_name="mine", max_context=100))
    assert renamed.names == ("mine", SMOLLM2)
    assert renamed.max_context == 100
    for name in (None, "mine", SMOLLM2):
        renamed.check_name(name)
    with pytest.raises(RequestError) as error:
        renamed.check_name("other")
    assert error.value.status == 404


def test_a_model_without_tokenizer():
    model = load_served_model(ModelConfig(name="tests/fixtures/step3-tiny"))
    assert model.tokenizer is None
    with pytest.raises(RequestError, match="token ids only"):
        model.need_template()

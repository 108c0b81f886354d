"""What the model recommends is what a request gets that does not say; what it says counts."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import gguf
import pytest

from afd.config import GatewayConfig, ModelConfig
from afd.errors import ModelError
from afd.gateway.api.parameters import chat_job, completion_job
from afd.gateway.api.schema import chat_decoder, completion_decoder
from afd.gateway.served_model import load_served_model
from afd.model.loading import ModelFolder, resolve_model
from afd.model.sampling_defaults import NO_DEFAULTS, SamplingDefaults, defaults_of_gguf, sampling_defaults
from tests.fakes.text_model import text_model
from tests.unit.model.model_files import STEP3_TINY

ALL = SamplingDefaults(
    temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.05, max_tokens=30
)  # fmt: skip


def sampled(defaults: SamplingDefaults, **fields: object):  # type: ignore[no-untyped-def]
    model = dataclasses.replace(text_model(), sampling_defaults=defaults)
    body = chat_decoder.decode(json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode())
    return chat_job(body, [1, 2], {}, model, GatewayConfig()).prompts[0][1]


def folder_with(tmp_path: Path, config: object) -> ModelFolder:
    """step3-tiny with a generation_config.json of its own."""
    folder = resolve_model(str(STEP3_TINY))
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return dataclasses.replace(folder, path=tmp_path)


def test_without_a_recommendation_openai_defaults_hold() -> None:
    sampling = sampled(NO_DEFAULTS)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert sampling.repetition_penalty == 1.0 and sampling.max_tokens == 254


def test_the_recommendation_fills_what_is_left_out() -> None:
    sampling = sampled(ALL)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.6, 0.95, 20, 0.1)
    assert sampling.repetition_penalty == 1.05 and sampling.max_tokens == 30
    assert sampled(SamplingDefaults(top_k=-1)).top_k == 0


def test_what_the_request_says_counts() -> None:
    fields = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 100}
    sampling = sampled(ALL, **fields)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 1, 0, 0)
    assert sampling.repetition_penalty == 1 and sampling.max_tokens == 100
    assert sampled(ALL, temperature=None).temperature == 0.6


def test_completions_keep_their_short_default() -> None:
    body = completion_decoder.decode(b'{"prompt": "x"}')
    for defaults, expected in ((ALL, 16), (SamplingDefaults(max_tokens=5), 5)):
        model = dataclasses.replace(text_model(), sampling_defaults=defaults)
        sampling = completion_job(body, [[1]], {}, model, GatewayConfig()).prompts[0][1]
        assert sampling.max_tokens == expected


def test_generation_config_json(tmp_path: Path) -> None:
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05,
              "max_new_tokens": 30, "do_sample": False, "eos_token_id": [1]}  # fmt: skip
    assert sampling_defaults(folder_with(tmp_path, config)) == ALL
    assert sampling_defaults(folder_with(tmp_path, {"temperature": None, "top_k": -1})) == SamplingDefaults(top_k=-1)
    assert sampling_defaults(folder_with(tmp_path, {})) == NO_DEFAULTS
    assert sampling_defaults(resolve_model("dummy:llama-tiny")) == NO_DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_k", -2),
     ("top_k", 2.5), ("min_p", 2), ("repetition_penalty", 0), ("max_new_tokens", 0)],
)  # fmt: skip
def test_a_value_that_is_none_is_named(tmp_path: Path, key: str, value: object) -> None:
    name = {"max_new_tokens": "max_tokens"}.get(key, key)
    with pytest.raises(ModelError, match=rf"generation_config\.json: .+: {name} \(gateway\.generation_config = none"):
        sampling_defaults(folder_with(tmp_path, {key: value}))


def test_gguf_metadata() -> None:
    values = {gguf.Keys.General.SAMPLING_TEMP: 0.5, gguf.Keys.General.SAMPLING_TOP_K: 7}
    assert defaults_of_gguf(values, "m.gguf") == SamplingDefaults(temperature=0.5, top_k=7)
    with pytest.raises(ModelError, match=r"m\.gguf: .+: top_p"):
        defaults_of_gguf({gguf.Keys.General.SAMPLING_TOP_P: "x"}, "m.gguf")


def test_the_default_models_answers_are_sensible_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = load_served_model(ModelConfig())
    assert model.sampling_defaults == SamplingDefaults(temperature=0.2, top_p=0.9)
    assert "sampling defaults of this model: temperature 0.2, top_p 0.9" in caplog.text
    plain = load_served_model(ModelConfig(), "none")
    assert plain.sampling_defaults == NO_DEFAULTS

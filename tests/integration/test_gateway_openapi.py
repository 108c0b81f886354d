"""The OpenAPI document is valid, and what the gateway answers is what it says; the examples of docs/api.md work."""

import copy
import json
import shlex
from pathlib import Path

import jsonschema
import pytest
from openapi_spec_validator import validate

from tests.fakes.async_test import async_test
from tests.fakes.gateway import events, gateway, saying
from tests.fakes.text_model import text_model

MODEL = text_model()
HI = [{"role": "user", "content": "hi"}]
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


async def document_of(rig):
    return (await rig.client.get("/openapi.json")).json()


def check(document, schema, value):
    """The value is of a schema of the document, and has nothing that the document leaves out."""
    root = copy.deepcopy(document)
    for shape in root["components"]["schemas"].values():
        if shape.get("type") == "object" and "properties" in shape:
            shape["additionalProperties"] = False
    jsonschema.Draft202012Validator({**schema, "components": root["components"]}).validate(value)


def content_of(document, path, method, status, media_type="application/json"):
    return document["paths"][path][method]["responses"][str(status)]["content"][media_type]["schema"]


@async_test
async def test_the_document_is_valid_and_has_every_route():
    async with gateway(MODEL, num_workers=0) as rig:
        document = await document_of(rig)
        validate(document)
        for path in document["paths"]:
            for method in ("get", "post"):
                answer = await rig.client.request(method, path.replace("{model_name}", "tiny"), content=b"")
                assert (answer.status_code != 405) == (method in document["paths"][path]), (method, path)
    assert set(document["paths"]) == {
        "/", "/livez", "/readyz", "/health", "/metrics", "/version", "/cluster",
        "/v1/models", "/v1/models/{model_name}", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize",
    }  # fmt: skip
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ends = [field for field in operation.get("parameters", ()) if field["in"] == "path"]
            assert [field["name"] for field in ends] == (["model_name"] if "{" in path else [])
            assert operation["responses"]["200"]["content"]


@async_test
async def test_which_routes_need_a_key():
    async with gateway(MODEL, keys=["k"]) as rig:
        document = await document_of_with_key(rig)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answer = await rig.client.request(method, path.replace("{model_name}", "tiny"))
                closed = answer.status_code == 401
                assert ({"api_key": []} in operation.get("security", [])) == closed, path
                assert ("401" in operation["responses"]) == closed, path
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"


async def document_of_with_key(rig):
    return (await rig.client.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()


BODIES = [
    ("/v1/chat/completions", {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("/v1/chat/completions", {"messages": HI, "stop": "o w"}),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "return_token_ids": True, "stop": ["o w"]}),
    ("/v1/completions", {"prompt": [1, 2], "echo": True}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": HI}),
    ("/detokenize", {"tokens": [1, 2]}),
]


@async_test
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_answers_are_as_described(path, body):
    async with gateway(MODEL) as rig:
        rig.worker.script = saying(MODEL, "hello world")
        document = await document_of(rig)
        answer = await rig.client.post(path, json=body)
        check(document, content_of(document, path, "post", 200), answer.json())
        check(document, document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], body)
        described = document["paths"][path]["post"]["responses"]["200"]["content"].get("text/event-stream")
        if described:
            options = {"include_usage": True, "continuous_usage_stats": True}
            for extra in ({}, {"stream_options": options}):
                stream = events((await rig.client.post(path, json={**body, **extra, "stream": True})).text)
                for event in stream:
                    check(document, described["schema"]["contentSchema"], event)


@async_test
async def test_gets_are_as_described():
    async with gateway(MODEL) as rig:
        document = await document_of(rig)
        for path, operations in document["paths"].items():
            if "get" in operations:
                answer = await rig.client.get(path.replace("{model_name}", "tiny"))
                media_type = answer.headers["content-type"].partition(";")[0]
                schema = content_of(document, path, "get", 200, media_type)
                check(document, schema, answer.json() if media_type == "application/json" else answer.text)


@async_test
async def test_errors_are_as_described():
    async with gateway(MODEL, limits={"max_body_bytes": 1000}, recovery_timeout_s=0.05) as rig:
        document = await document_of(rig)
        post = rig.client.post
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            for answer in (
                await post(path, content=b"{"),
                await post(path, content=b" " * 2000),
                await post(path, json={"model": "x", "messages": HI, "prompt": "x", "tokens": []}),
            ):
                schema = content_of(document, path, "post", answer.status_code)
                check(document, schema, answer.json())
        missing = await rig.client.get("/v1/models/x")
        check(document, content_of(document, "/v1/models/{model_name}", "get", 404), missing.json())
        rig.publish([])
        await rig.membership.wait_ready(False)
        for path, method, answer in (
            ("/readyz", "get", await rig.client.get("/readyz")),
            ("/v1/completions", "post", await rig.complete([1])),
        ):
            assert answer.status_code == 503
            assert "Retry-After" in document["paths"][path][method]["responses"]["503"]["headers"]
            check(document, content_of(document, path, method, 503), answer.json())


@async_test
async def test_fields_that_are_not_served_are_in_the_document():
    async with gateway(MODEL, num_workers=0) as rig:
        document = await document_of(rig)
    chat = document["components"]["schemas"]["ChatBody"]
    check(document, chat, {"messages": HI, "use_beam_search": False, "structured_outputs": None})
    with pytest.raises(jsonschema.ValidationError):
        check(document, chat, {"messages": HI, "structured_outputs": {"choice": ["a"]}})


def curl_lines():
    """(path, headers, body) of the curl commands in the code blocks of the page."""
    blocks = DOCS.read_text().split("```")[1::2]
    for words in (shlex.split(line) for block in blocks for line in block.replace("\n     ", " ").splitlines()):
        if words and words[0] == "curl":
            options = dict(zip(words[2::2], words[3::2], strict=True))
            header = options.pop("-H", "X-None: 1").split(": ")
            body = options.pop("-d", None)
            assert not options
            yield words[1].removeprefix("localhost:8000"), dict([header]), body


@async_test
async def test_the_examples_of_the_docs_work():
    examples = list(curl_lines())
    assert len(examples) >= 8
    async with gateway(MODEL) as rig:
        document = await document_of(rig)
        for path, headers, body in examples:
            if body is None:
                answer = await rig.client.get(path)
            else:
                answer = await rig.client.post(path, content=body, headers=headers)
                schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
                check(document, schema, json.loads(body))
            assert answer.status_code == 200, (path, answer.text)

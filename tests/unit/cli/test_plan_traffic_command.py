"""`afd plan` asked with requests a second and their lengths, and with two kinds of chips in one role."""

import json
import math
from pathlib import Path

import pytest

SMALL = ["--model", "step3", "--max-gpus", "32", "--streams", "3"]
LENGTHS = ["--input-len", "2000", "--output-len", "500"]


def test_the_documentation_shows_what_is_printed(run_plan):
    text = Path("docs/planning.md").read_text()
    block = text.partition("## Requests a second")[2].split("```")[1].strip().splitlines()
    command = block[0].removeprefix("$ afd plan ").split()
    code, out, _ = run_plan(*command)
    assert code == 0
    assert out.splitlines()[: len(block) - 1] == block[1:]
    assert "prompts of 2000 tokens in the same steps: " in out


def test_a_rate_that_the_chips_do_not_serve_as_json(run_plan):
    question = ["--model", "step3", "--streams", "3", "--inventory", "h800:24", *LENGTHS, "--rate", "5000"]
    code, out, _ = run_plan(*question, "--sla-ttft-ms", "2000", "--utilisation", "0.7", "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["context"] == 2250
    traffic = answer["traffic"]
    given = ("rate", "sla_ttft_ms", "utilisation", "enough")
    assert [traffic[key] for key in given] == [5000, 2000, 0.7, False]
    for way in traffic["ways"]:
        assert way["requests_per_s"] == way["max_requests_per_s"] < 5000
        assert way["chips"]["h800"] <= 24
        assert way["usd_per_hour"] == pytest.approx(2.0 * way["chips"]["h800"])
        assert 0 < way["ttft_ms"] <= way["ttft_p99_ms"] <= 2000
        assert (way["prefill"] is None) == ("pool" not in way["way"])
    best = answer["plans"][0]
    assert best["prefill"]["rows_per_attention_chip"] == pytest.approx(best["tokens_per_attention_chip"] * 2000 / 499)
    assert 0.3 < best["prefill"]["share"] < 0.9
    assert best["prefill"]["requests_per_s"] == pytest.approx(best["tokens_per_s"] / 499)
    rows = best["tokens_per_attention_chip"] + best["prefill"]["rows_per_attention_chip"]
    assert answer["deploy"]["max_step_tokens"] == max(256, math.ceil(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "100"], "--rate needs the lengths of requests: --input-len and --output-len"),
        (["--input-len", "100"], "--input-len and --output-len go together"),
        ([*LENGTHS, "--context", "100"], "--context follows from --input-len and --output-len"),
        (["--input-len", "100", "--output-len", "1"], "there is nothing to decode"),
        ([*LENGTHS, "--utilisation", "1"], "--utilisation 1: expected a share between 0 and 1"),
        (["--input-len", "65000", "--output-len", "1000"], "context 66000 is past the limit of step3"),
        (["--attention", "h20:4,h800:x"], "--attention h20:4,h800:x: expected instances of each kind"),
    ],
)
def test_mistakes_in_one_line(run_plan, arguments, message):
    code, out, err = run_plan(*SMALL, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_one_topology_with_two_kinds_of_attention_chips(run_plan):
    question = ["tgs", "--model", "step3", "--context", "8192", "--ffn", "h800", "--streams", "3"]
    code, out, _ = run_plan(*question, "--topology", "5A2F", "--attention", "h20:4,h800:1", "--json")
    assert code == 0
    plan = json.loads(out)
    assert [(part["chip"], part["instances"]) for part in plan["attention_parts"]] == [("h20", 4), ("h800", 1)]
    assert plan["usd_per_hour"] == pytest.approx(32 * 0.8 + 24 * 2)
    code, out, _ = run_plan(*question, "--topology", "5A2F", "--attention", "h20:4,h800:1")
    assert "A on 4 x H20 + 1 x H800, F on H800" in out
    assert "tokens of an attention chip and micro-batch: " in out
    code, out, _ = run_plan(*question[:-4], "--topology", "4A2F", "--attention", "h20", "--ffn", "h800:1,h20:1")
    assert "of the FFN, each instance: " in out
    for counts, message in (("h20:4", "4 instances, but 5A2F has 5"), ("h20,h800", "or instances of each")):
        code, _, err = run_plan(*question, "--topology", "5A2F", "--attention", counts)
        assert code == 2
        assert message in err


def test_lengths_for_one_topology(run_plan):
    code, out, _ = run_plan("tgs", "--model", "step3", "--topology", "1A2F", *LENGTHS)
    assert code == 0
    assert "prompts of 2000 tokens in the same steps: " in out

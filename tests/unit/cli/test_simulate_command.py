"""`afd simulate`: text and JSON, and one clear line for what cannot be simulated."""

from __future__ import annotations

import json
import re

import pytest

from afd.cli.main import main
from afd.simulate.arrivals import Lengths, OpenLoop
from afd.simulate.times import rounded

QUICK = ["--model", "smollm2-135m-instruct", "--ranks-per-instance", "1", "--requests", "40", "--output-len", "12"]


@pytest.fixture
def simulate(capsys):
    def run(*flags):
        code = main(["simulate", "--topology", "2A1F", *QUICK, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_text(simulate):
    code, out, err = simulate("--rate", "200", "--fail", "attention:0@0.05+0.2")
    assert code == 0 and err == ""
    assert "40 answered, 0 refused, 0 lost" in out and "goodput" in out and "gangs of" in out


def test_json_has_the_names_of_afd_bench(simulate):
    code, out, _ = simulate("--concurrency", "8", "--json", "--streams", "2", "--detail", "layers")
    result = json.loads(out)
    assert code == 0
    assert result["topology"] == "2A1F" and result["streams"] == 2 and result["num_answered"] == 40
    assert result["output_tokens"] == 40 * 12
    for key in ("output_throughput", "request_goodput", "median_tpot_ms", "p99_ttft_ms", "ffn_bubble", "imbalance"):
        assert result[key] >= 0.0


def test_the_rate_is_a_share_of_the_planners_forecast(simulate):
    rates = [json.loads(simulate("--load", share, "--json")[1])["rate"] for share in ("0.01", "0.02")]
    assert rates[1] == pytest.approx(2 * rates[0])


def test_networks_and_crowded_experts_cost_throughput_of_a_closed_loop(simulate):
    def tokens_per_s(*flags):
        fixed = (
            "--model",
            "step3",
            "--ranks-per-instance",
            "8",
            "--topology",
            "2A2F",
            "--concurrency",
            "400",
            "--json",
        )
        result = json.loads(simulate(*fixed, "--requests", "400", "--input-len", "8", *flags)[1])
        assert result["num_answered"] == 400 and result["usd_per_mtok"] > 0.0
        return result["output_throughput"]

    free = tokens_per_s()
    assert tokens_per_s("--oversubscription", "32") < tokens_per_s("--oversubscription", "8") < free
    assert tokens_per_s("--network-gbit", "10") < free and tokens_per_s("--slow", "ffn:0*2") < 0.8 * free


def test_several_seeds_have_intervals(simulate):
    code, out, _ = simulate("--rate", "200", "--seeds", "3", "--json")
    result = json.loads(out)
    assert code == 0 and result["seeds"] == 3 and [run["seed"] for run in result["runs"]] == [0, 1, 2]
    throughput = [run["output_throughput"] for run in result["runs"]]
    interval = result["intervals"]["output_throughput"]
    assert interval["mean"] == pytest.approx(sum(throughput) / 3) and interval["ci95"] > 0.0
    assert "3 seeds, 95 % confidence" in simulate("--rate", "200", "--seeds", "3")[1]


def test_what_the_autoscaler_would_advise(simulate):
    code, out, _ = simulate("--requests", "300", "--rate", "40", "--autoscale", "1A1F:4A4F")
    found = re.search(
        r"^autoscale: 2A1F -> \dA\dF: ([\d,]+) tokens/s are asked for; .* 2A1F serves ([\d,]+)", out, re.M
    )
    assert code == 0 and found is not None
    asked, served = (int(number.replace(",", "")) for number in found.groups())
    assert asked == pytest.approx(40 * 12, rel=0.3) and served > asked


def test_the_same_requests_without_afd(simulate):
    flags = ("--model", "step3", "--ranks-per-instance", "8", "--topology", "2A2F", "--concurrency", "32")
    result = json.loads(simulate(*flags, "--baseline", "ep", "--json")[1])
    assert result["baseline"]["name"] == "EP32 on 32 x H800" and result["baseline"]["num_answered"] == 40
    assert result["baseline"]["output_tokens"] == result["output_tokens"] == 40 * 12
    assert "AFD's goodput is" in simulate(*flags, "--baseline", "ep")[1]


def test_a_trace_file_is_replayed(simulate, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"at_s": {0.1 * i}, "input_len": {5 + i}, "output_len": 3}}\n' for i in range(9)))
    code, out, _ = simulate("--trace", str(trace), "--json")
    result = json.loads(out)
    assert code == 0 and result["num_answered"] == 9 and result["input_tokens"] == sum(range(5, 14))
    assert result["duration_s"] == pytest.approx(0.8, abs=0.1)


def test_prefixes_of_a_mooncake_trace_are_shared_and_each_request_is_written(simulate, tmp_path):
    trace, outcomes = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    line = {"input_length": 600, "output_length": 3}
    trace.write_text("".join(json.dumps({"timestamp": t, **line, "hash_ids": [4, t]}) + "\n" for t in (900, 0)))
    flags = ("--topology", "1A1F", "--trace", str(trace), "--per-request", str(outcomes))
    code, out, _ = simulate(*flags)
    assert code == 0 and "prefix cache: 512 prompt tokens found, 42.7%" in out
    told = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert [(line["at_s"], line["cached_tokens"], line["ending"]) for line in told] == [
        (0.0, 0, "answered"),
        (0.9, 512, "answered"),
    ]


def test_a_calibration_gives_the_stage_times(simulate, tmp_path):
    point = {"tokens": 8, "seconds": 1e-3}
    measured = {"schema": "afd-calibration/1", "model": "smollm2-135m-instruct", "topology": "2A1F"}
    measured |= {"t_A": [point], "t_F": [point], "t_C": [{"tokens": 8, "seconds": 1e-4}], "t_head": [point]}
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(measured))
    flags = ("--calibrate", str(file), "--concurrency", "16", "--streams", "1", "--input-len", "1", "--json")
    result = json.loads(simulate(*flags)[1])
    # 8 rows on each worker, 16 in the gang: 30 layers of A 1 ms, F 2 ms, C 0.1 ms, and 1 ms of head
    assert result["median_tpot_ms"] == pytest.approx(30 * 3.1 + 1.0, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "nothing"], "nothing"),
        (["--attention", "h900"], "h900"),
        (["--topology", "2A"], "is not of the form xAyF"),
        (["--input-len", "9000"], "past the limit of smollm2-135m-instruct: 8192"),
        (["--max-tokens", "5"], "below the longest answer"),
        (["--stages", "attention_us=5"], "attention_us and ffn_us must be above 0"),
        (["--stages", "speed=5"], "'speed=5' is not KEY=MICROSECONDS"),
        (["--stages", "attention_us=5,ffn_us=5"], "give --rate or --concurrency"),
        (["--sla-tpot-ms", "0.001"], "does not hold a TPOT of 0.001 ms at any batch"),
        (["--fail", "ffn:1@3"], "2A1F has ffn workers 0 to 0"),
        (["--fail", "ffn@3"], "is not ROLE:INDEX@SECONDS"),
        (["--trace", "/nowhere.jsonl"], "--trace /nowhere.jsonl: No such file"),
        (["--rate", "9", "--per-request", "/nowhere/out.jsonl"], "--per-request /nowhere/out.jsonl: No such file"),
        (["--calibrate", "/nowhere.json"], "--calibrate /nowhere.json: No such file"),
        (["--model", "step3", "--topology", "1A1F"], "GB of ffn weights"),
        (["--min-chunk-tokens", "999"], "--min-chunk-tokens must not exceed --max-step-tokens"),
        (["--efficiency", "gemm=7"], "gemm"),
        (["--slow", "ffn:1*2"], "2A1F has ffn workers 0 to 0"),
        (["--slow", "ffn:0"], "is not ROLE:INDEX*FACTOR"),
        (["--scale", "0@3"], "is not WORKERS@SECONDS"),
        (["--rollout", "ffn"], "is not ROLE@SECONDS"),
        (["--fail", "ffn:0@3+soon"], "is not ROLE:INDEX@SECONDS"),
        (["--seeds", "1"], "--seeds must be 2 to 31"),
        (["--autoscale", "4A1F:2A2F"], "--min 4A1F exceeds --max 2A2F"),
        (["--autoscale-apply"], "--autoscale-apply follows what --autoscale MIN:MAX advises"),
        (["--seeds", "3", "--baseline", "ep"], "--seeds: --per-request, --baseline and --autoscale are of one run"),
        (["--seeds", "3", "--trace", "x"], "--seeds: a trace is the same with every seed"),
        (
            ["--baseline", "ep", "--rate", "9", "--slow", "ffn:0*2"],
            "--baseline ep knows no --fail, --rollout,",
        ),
        (["--baseline", "ep", "--rate", "9", "--ffn", "h20"], "the two roles have different chips"),
        (["--expert-skew", "1"], "smollm2-135m-instruct has no experts"),
        (["--expert-skew", "1", "--stages", "attention_us=5,ffn_us=5", "--rate", "9"], "data-sheet times"),
        (["--oversubscription", "2", "--transfers", "delay"], "--oversubscription needs data-sheet links"),
        (["--network-gbit", "fast"], "expected Gbit/s per chip"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(simulate, flags, complaint):
    code, out, err = simulate(*flags)
    assert code == 2 and out == ""
    assert complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('{"at_s": 1, "input_len": 0, "output_len": 3}', "line 1"),
        ("{", "line 1"),
        ('{"at_s": 1, "input_len": 9000, "output_len": 3}', "past the limit"),
        ("", "no requests"),
    ],
)  # fmt: skip
def test_a_bad_trace_file_is_named_by_its_line(simulate, tmp_path, lines, complaint):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(lines)
    code, _, err = simulate("--trace", str(trace))
    assert code == 2 and complaint in err and err.count("\n") == 1


def test_sizes_are_rounded_to_less_than_a_percent():
    assert [rounded(n) for n in (0, 0.2, 1, 99, 127, 128, 130, 1000)] == [0, 1, 1, 99, 127, 128, 130, 1000]
    for n in range(1, 100_000, 37):
        assert abs(rounded(n) - n) <= n / 128


def test_arrivals_have_their_rate_and_their_burstiness():
    for burstiness, spread in ((1.0, 1.0), (0.25, 2.0)):
        times = [r.at_s for r in OpenLoop(4000, 20.0, burstiness, Lengths(5), Lengths(5), seed=1)]
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        mean = sum(gaps) / len(gaps)
        deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
        assert mean == pytest.approx(0.05, rel=0.1)
        assert deviation / mean == pytest.approx(spread, rel=0.1)

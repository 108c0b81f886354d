"""The command line: JSON keys, text, exit codes, one clear line for every mistake."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from afd.cli.flags import config_from_args
from afd.cli.main import build_parser, main
from tests.unit.plan.hf_configs import MIXTRAL
from tests.unit.plan.report_tables import CHIPS, TABLE_2, TABLE_8

COST_KEYS = [
    "model", "chip", "context", "attention_usd_per_mtok", "ffn_usd_per_mtok", "total_usd_per_mtok",
    "kv_bytes", "attention_flops", "linear_flops", "ffn_flops",
]  # fmt: skip

H800 = ["--attention", "h800", "--ffn", "h800"]


@pytest.fixture
def run_json(run_plan):
    def run_command(*arguments):
        code, out, err = run_plan(*arguments, "--json")
        assert err == ""
        return code, json.loads(out)

    return run_command


def test_cost_of_the_reports_models_and_chips(run_json):
    code, rows = run_json("cost", "--context", "8192,32768")
    assert code == 0
    assert {row["model"] for row in rows} == set(TABLE_2)
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert len(rows) == 9 * 4 * 2
    assert all(list(row) == COST_KEYS for row in rows)
    (row,) = [r for r in rows if (r["model"], r["chip"], r["context"]) == ("step3", "h20", 8192)]
    assert row["kv_bytes"] == 61 * 8192 * 512
    assert round(row["attention_usd_per_mtok"], 3) == 0.040


def test_cost_of_afd_and_of_chosen_models(run_json):
    _, rows = run_json("cost", "--context", "8192", "--model", "step3,deepseek-v3", "--deployment", "afd")
    assert [(row["model"], row["chip"]) for row in rows] == [("step3", "h20+h800"), ("deepseek-v3", "h800")]
    _, rows = run_json("cost", "--context", "8192", "--model", "step3", "--chip", "h800", "--price", "h800=4")
    assert round(rows[0]["ffn_usd_per_mtok"], 3) == 0.030


def test_cost_beyond_a_models_limit_is_computed_and_said_to_be(run_plan, run_json):
    """Report Fig. 3: Step-3 at 128K, 0.700 USD on H800 (61 x 131072 x 512 B of cache)."""
    _, rows = run_json("cost", "--model", "step3", "--chip", "h800", "--context", "131072")
    assert rows[0]["total_usd_per_mtok"] == pytest.approx(0.700, abs=0.001)
    code, out, _ = run_plan("cost", "--context", "131072")
    assert code == 0
    assert "step3 serves 65536 tokens" in out


def test_an_inventory_and_a_network_as_text(run_plan):
    code, out, _ = run_plan(
        "--model", "step3", "--context", "8192", "--inventory", "h20:32,h800:16", "--network-gbit", "100/server"
    )
    assert code == 0
    assert out.startswith("runs today (instances of one chip)")
    for expected in (
        "your chips: ",
        "USD an hour",
        "without AFD: ",
        "forecast range: ",
        "KV cache of 8 bits",
        "budget",
    ):
        assert expected in out


def test_cost_as_text(run_plan):
    code, out, _ = run_plan("cost", "--model", "step3", "--context", "8192")
    assert code == 0
    assert "0.063" in out


@pytest.mark.parametrize(("topology", "context", "dtype", "batch", "tgs"), TABLE_8)
def test_tgs_of_table_8(run_json, topology, context, dtype, batch, tgs):
    code, plan = run_json(
        "tgs", "--topology", topology, "--model", "step3", "--context", str(context), "--attention-dtype", dtype, *H800
    )
    assert code == 0
    assert plan["tgs"] == pytest.approx(tgs, rel=0.05)
    assert plan["tpot_ms"] <= 50
    assert plan["batch"] == pytest.approx(batch, rel=0.05)
    assert plan["bound"] in {"attention", "ffn", "network", "memory"}
    assert plan["tgs"] == pytest.approx(plan["batch"] / plan["chips"] / plan["tpot_ms"] * 1e3)


def test_tgs_at_a_given_batch_and_as_text(run_plan, run_json):
    _, plan = run_json("tgs", "--topology", "2A2F", "--model", "step3", "--batch", "4800", "--streams", "3")
    assert (plan["batch"], plan["micro_batch"]) == (4800, 1600)
    code, out, _ = run_plan("tgs", "--topology", "2A2F", "--model", "step3")
    assert code == 0
    assert "bound by attention" in out
    assert "factors: core" in out


def test_tgs_that_misses_the_sla_is_an_answer_with_exit_code_1(run_json):
    code, plan = run_json("tgs", "--topology", "2A2F", "--model", "step3", "--sla-tpot-ms", "10")
    assert code == 1
    assert plan["feasible"] is False
    assert plan["tpot_ms"] > 10
    assert plan["tokens_per_attention_chip"] == 1


def test_search_answers_everything_at_once(run_json):
    code, answer = run_json("--model", "step3", "--context", "8192", "--sla-tpot-ms", "50", *H800, "--top", "3")
    assert code == 0
    best = answer["plans"][0]
    assert (best["topology"], best["chips"], len(answer["plans"])) == ("4A2F", 48, 3)
    assert (answer["deploy"]["topology"], answer["deploy"]["command"]) == ("4A2F", None)
    assert "a worker of AFD has one: plan with --ranks-per-instance 1" in answer["deploy"]["obstacles"][0]
    assert answer["comparison"]["worth_it"] is True
    assert answer["comparison"]["break_even_context"] == 2048
    assert [point["afd_ahead"] for point in answer["comparison"]["by_context"]] == [False, *[True] * 6]
    assert [point["gbit_per_s"] for point in answer["tcp"]] == [10, 25, 100, 400]
    assert answer["efficiency"]["gemm"] == 0.65


def test_search_as_text_says_what_matters(run_plan):
    code, out, _ = run_plan("--model", "step3")
    assert code == 0
    shown = Path("docs/planning.md").read_text().partition("## What a search prints")[2].split("```")[1]
    printed = out.splitlines()
    for line in shown.strip().splitlines():
        assert line == "..." or line in printed
    for expected in (
        "2A2F",
        "bound by attention",
        "AFD pays: 1.",
        "AFD is ahead at contexts of 2048 to 65536 tokens (1024 to 65536 tried)",
        "TCP at 25 Gbit/s per chip: cannot hold the SLA",
        "AFD cannot run this plan as it is:",
        "plan with --ranks-per-instance 1",
        "factors: core",
    ):
        assert expected in out


def test_search_without_an_answer_exits_with_1_and_says_how_far_off(run_plan):
    code, out, _ = run_plan("--model", "step3", "--sla-tpot-ms", "5")
    assert code == 1
    assert out.startswith("no topology of up to 256 chips holds 5 ms: the closest")


def test_heterogeneous_search_names_both_chips(run_plan):
    _, out, _ = run_plan("--model", "step3", "--context", "8192", "--heterogeneous", "--max-gpus", "96", "--top", "2")
    assert "H20+H800" in out
    assert "A on H20, F on H800" in out


def test_a_models_own_config_and_its_path_in_the_command(run_json, tmp_path):
    path = tmp_path / "mix tral" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MIXTRAL))
    code, answer = run_json("--model", str(path), "--context", "4096", "--max-gpus", "64")
    assert code == 0
    assert answer["model"] == "mix tral"
    assert answer["deploy"]["model"] == str(path.parent)


def test_a_model_of_short_contexts_is_compared_at_its_own_limit(run_plan, run_json, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MIXTRAL, "max_position_embeddings": 512}))
    arguments = ("--model", str(path), "--context", "512", "--max-gpus", "32")
    _, answer = run_json(*arguments)
    assert [point["context"] for point in answer["comparison"]["by_context"]] == [512]
    code, out, _ = run_plan(*arguments)
    assert code == 0
    assert "512 tried" in out or "from 512 to 512" in out


def test_16_bit_weights_cost_throughput(run_json):
    fp8, bf16 = (
        run_json("tgs", "--topology", "2A4F", "--model", "step3", "--weight-dtype", dtype)[1]["tgs"]
        for dtype in ("fp8", "bf16")
    )
    assert bf16 < fp8


def test_figures_without_matplotlib_name_the_extra(run_plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "afd.plan.figures", raising=False)
    code, _, err = run_plan("figures")
    assert code == 2
    assert "pip install 'afd[plan]'" in err


def test_limits(run_plan, run_json):
    _, rows = run_json("limits", "--model", "step3", "--chip", "l20,l4,h800")
    by_chip = {row["chip"]: row for row in rows}
    assert by_chip["l20"]["ffn_servers"] == 6
    assert by_chip["l4"]["attention_feasible"] is False
    assert round(by_chip["h800"]["min_sparsity"], 3) == 0.058
    _, out, _ = run_plan("limits")
    assert "impossible" in out


def test_calibrated_tgs(run_plan, run_json, tmp_path):
    path = tmp_path / "measured.json"
    points = [{"tokens": n, "seconds": 1e-3 + 1e-5 * n} for n in (1, 8, 64)]
    cached = [{**point, "context": 512} for point in points]
    document = {
        "schema": "afd-calibration/1",
        "model": "smollm2-135m-instruct",
        "topology": "1A1F",
        "t_A": cached,
        "t_F": points,
        "t_C": points,
        "t_head": points,
    }
    path.write_text(json.dumps(document))
    arguments = [
        "tgs", "--topology", "1A1F", "--model", "smollm2-135m-instruct", "--context", "512",
        "--ranks-per-instance", "1", "--attention", "l4", "--ffn", "l4", "--calibrate", str(path),
        "--sla-tpot-ms", "500", "--batch", "96", "--streams", "3",
    ]  # fmt: skip
    _, plan = run_json(*arguments)
    stage_s = 1e-3 + 1e-5 * 32
    assert plan["stage_us"]["attention"] == pytest.approx(stage_s * 1e6)
    assert plan["tpot_ms"] == pytest.approx(3 * (30 * stage_s + stage_s) * 1e3)
    _, out, _ = run_plan(*arguments)
    assert "stage times measured" in out
    code, _, err = run_plan("--model", "step3", "--calibrate", str(path), "--heterogeneous")
    assert code == 2
    assert "one --attention and one --ffn chip" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which model"),
        (["--model", "gpt-9"], "unknown model 'gpt-9'"),
        (["--model", "step3", "--attention", "h900"], "unknown chip 'h900'"),
        (["--model", "step3", "--context", "100000"], "past the limit of step3: 65536"),
        (["--model", "step3", "--price", "h800=-2"], "a price must be positive"),
        (["--model", "step3", "--max-gpus", "8"], "the smallest topology, 1A1F, has 16"),
        (["--model", "step3", "--efficiency", "gemm=2"], "gemm"),
        (["--model", "step3", "--dispatch", "sparse"], "has a shared expert"),
        (["--model", "step3", "--hardware-file", "/nonexistent"], "No such file"),
        (["tgs", "--model", "step3", "--topology", "2x2"], "not of the form xAyF"),
        (["tgs", "--model", "step3", "--topology", "mono"], "mono"),
        (["tgs", "--model", "step3", "--topology", "1A1F", "--ffn", "l4"], "GB of ffn weights per L4"),
        (["tgs", "--model", "step3", "--topology", "2A2F", "--batch", "7"], "multiple of 16"),
        (["tgs", "--model", "step3", "--topology", "2A2F", "--attention", "h800,h20"], "takes one"),
        (["cost", "--model", "nope"], "unknown model"),
        (["--model", "step3", "--inventory", "h20"], "CHIP:COUNT"),
        (["--model", "step3", "--inventory", "h20:16", "--ffn", "h800"], "--inventory has no h800"),
        (["--model", "step3", "--network-gbit", "fast"], "Gbit/s per chip"),
        (["cost", "--chip", "l20"], "no price"),
        (["limits", "--chip", "tpu"], "unknown chip"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run_plan, arguments, message):
    code, out, err = run_plan(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_request_too_long_for_the_chip_is_named(run_plan, tmp_path):
    hardware = tmp_path / "small.toml"
    hardware.write_text(
        '[small]\ntitle = "Small"\nbf16_tflops = 100\nmemory_gib = 18\nmemory_gb_per_s = 1000\n'
        'network_gbit_per_s = 100\ninterconnect_gb_per_s = 50\nsource = "test"\n'
    )
    small = ["--hardware-file", str(hardware), "--attention", "small", "--context", "65536"]
    code, _, err = run_plan("tgs", "--model", "step3", "--topology", "2A2F", "--streams", "3", *small)
    assert code == 2
    assert "a Small does not hold 3 requests of 65536 tokens" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--context", "0"],
        ["--context", "four"],
        ["--streams", "5"],
        ["--sla-tpot-ms", "-1"],
        ["--sla-tpot-ms", "nan"],
        ["--attention", ","],
        ["--attention-dtype", "fp4"],
        ["tgs", "--model", "step3"],
    ],
)
def test_arguments_that_cannot_be_parsed(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_json_may_stand_before_the_sub_command(run_plan):
    _, out, _ = run_plan("--json", "cost", "--model", "step3", "--context", "8192")
    assert len(json.loads(out)) == 4


RUNS_TODAY = ("--ranks-per-instance", "1", "--attention-dtype", "bf16")
"""What a plan has to be for AFD to run it: one chip a worker, a KV cache of 16 bits."""


def test_the_printed_command_is_one_that_afd_understands(run_json):
    _, answer = run_json("--model", "step3", "--max-gpus", "64", *RUNS_TODAY)
    command = shlex.split(answer["deploy"]["command"])
    assert command[0] == "afd"
    args = build_parser().parse_args(command[1:])
    assert str(config_from_args(args).topology) == answer["plans"][0]["topology"]


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-m", "afd", "plan", "limits", "--chip", "l20", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(result.stdout)[0]["chip"] == "l20"


def test_a_reader_that_went_away_is_not_an_error():
    command = f"{sys.executable} -m afd plan cost --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""

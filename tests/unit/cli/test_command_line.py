"""The `afd` command line: flags reach their keys, errors are one line, help needs no heavy library."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd.cli.flags import EVERY, FLAGS, config_from_args
from afd.cli.main import COMMANDS, build_parser, main
from afd.cli.status import load_text, status_text
from afd.config import ClusterConfig, config_to_toml_dict
from afd.messages.membership import ClusterView, Member, MemberStatus, Plan, StatusReply, WorkerInfo

MODEL = "dummy:llama-tiny"


def resolved(*argv: str) -> ClusterConfig:
    return config_from_args(build_parser().parse_args(argv))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_alone_is_the_one_among_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command imports its own module only, and must be found there."""
    texts = []
    for parser in (build_parser(command), build_parser()):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([command, "--help"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_every_flag_names_a_key_that_exists() -> None:
    known = {f"{section}.{key}" for section, table in config_to_toml_dict(ClusterConfig()).items() for key in table}
    assert {key for flag in FLAGS for key in flag.keys} <= known
    for command in EVERY:
        names = [flag.name for flag in FLAGS if command in flag.commands]
        assert len(names) == len(set(names)), f"{command} takes a flag twice"


def test_flags_reach_their_keys() -> None:
    config = resolved(
        *("up", "--topology", "2A1F", "--model", MODEL, "--port", "0", "--dtype", "float32", "--transport", "tcp"),
        *(
            "--streams",
            "2",
            "--ffn-parallel",
            "ep",
            "--dispatch",
            "sparse",
            "--threads",
            "3",
            "--checksum",
            "true",
            "--log-level",
            "debug",
        ),
    )
    assert str(config.topology) == "2A1F" and config.model.name == MODEL and config.gateway.port == 0
    assert config.model.dtype == "float32" and config.cluster.transport == "tcp" and config.cluster.checksum is True
    assert config.attention.streams == 2 and config.cluster.ffn_parallel == "ep"
    assert config.cluster.dispatch == "sparse"
    assert config.attention.threads == config.ffn.threads == 3 and config.log.level == "debug"


def test_the_same_flag_means_the_roles_own_key() -> None:
    assert resolved("gateway", "--host", "h", "--port", "1").gateway.host == "h"
    assert resolved("attention", "--host", "h", "--port", "1").attention.port == 1
    assert resolved("ffn", "--host", "h", "--coordinator", "c:1").coordinator.address == "c:1"


def test_set_reaches_every_key_and_comes_last(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[attention]\nblock_size = 8\nstreams = 1\n")
    config = resolved(
        *("up", "--config", str(file), "--streams", "2"),
        *("--set", "attention.streams=3", "--set", "model.name=plain text", "--set", "cluster.checksum=true"),
    )
    assert (config.attention.block_size, config.attention.streams) == (8, 3)
    assert config.model.name == "plain text" and config.cluster.checksum is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("up", "--topology", "3"), "topology '3'"),
        (("up", "--set", "gateway.prot=1"), "unknown key gateway.prot"),
        (("up", "--set", "nonsense"), "section.key=value"),
        (("up", "--config", "/nowhere.toml"), "cannot read config file /nowhere.toml"),
        (("up", "--model", "/no/such/model"), "/no/such/model"),
        (
            ("up", "--dry-run", "--model", "dummy:step3-tiny", "--ffn-parallel", "tp", "--dispatch", "sparse"),
            "cluster.dispatch sparse: cluster.ffn_parallel tp slices every expert over all ranks, so each FFN rank",
        ),
        (
            ("up", "--dry-run", "--model", "dummy:step3-tiny", "--dispatch", "sparse"),
            "hybrid slices the shared expert of dummy:step3-tiny over all ranks, so each FFN rank needs every row",
        ),
        (("up", "--secret-file", "/nowhere"), "cannot read secret file"),
        (("attention", "--model", MODEL), "--coordinator HOST:PORT is needed"),
        (("ffn", "--model", MODEL, "--coordinator", "127.0.0.1:1"), "--secret-file is needed"),
        (("coordinator",), "--secret-file is needed"),
        (("status",), "no `afd up` runs on this host"),
        (("chat", "--pid", "1"), "no `afd up` with pid 1"),
        (("status", "--coordinator", "127.0.0.1:1"), "--secret-file is needed"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    argv: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith("afd: error: ") and output.err.count("\n") == 1
    assert message in output.err and output.out == ""


def test_an_unreachable_coordinator_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    secret.chmod(0o600)
    assert main(["status", "--coordinator", "127.0.0.1:1", "--secret-file", str(secret)]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_dry_run_prints_what_each_process_gets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--dry-run", "--model", MODEL, "--topology", "2A2F", "--threads", "2", "--port", "0"]) == 0
    output = capsys.readouterr().out
    assert 'topology = "2A2F"' in output and "attention/1" in output and "FFN shard 1 of 2, 2 threads" in output
    assert main(["attention", "--dry-run", "--model", MODEL, "--coordinator", "h:1"]) == 0
    assert 'address = "h:1"' in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("afd 0.")


def test_status_shows_every_member_in_a_table() -> None:
    infos = [
        WorkerInfo("attention", "a", "10.0.0.1", 11, "h", metrics="10.0.0.1:90"),
        WorkerInfo("ffn", "f", "10.0.0.2", 12, "h"),
    ]
    members = [Member(infos[0], 0, ready=True), Member(infos[1], 0)]
    view = ClusterView("c" * 32, 7, 0, 1, 1, "smol", "h", "hybrid", Plan(), members[:1])
    reply = StatusReply(
        view,
        [MemberStatus(members[0], 0.11, 1.0, {"running": 3.0}), MemberStatus(members[1], 0.2, 0.5, {})],
        ["+0.0s attention/0 joined"],
    )
    lines = status_text(reply, url="http://x").splitlines()
    assert lines[0] == "1A1F  smol  waiting for workers, epoch 0  http://x"
    assert " ".join(lines[4].split()) == "attention/0 ready 0.1 s ago 10.0.0.1 pid 11 10.0.0.1:90"
    assert [" ".join(line.split()) for line in lines[7:9]] == ["LOAD", "attention/0 3 running"]
    assert "loading 50%" in lines[5] and lines[-1] == "+0.0s attention/0 joined"


def test_status_names_silent_experts_by_layer() -> None:
    info = WorkerInfo("ffn", "f", "10.0.0.2", 12, "h")
    view = ClusterView("c" * 32, 7, 1, 1, 2, "smol", "h", "tp", Plan(), [])
    found = [[(3, 11), (1, 0)], [(3, 2), (3, 11)], []]
    members = [MemberStatus(Member(info, rank), 0.1, 1.0, {}, experts) for rank, experts in enumerate(found)]
    lines = status_text(StatusReply(view, members, ["+0.0s ffn/0 joined"])).splitlines()
    assert lines[8:11] == [
        "silent experts (receive tokens, give nothing; see `afd inspect`):",
        "layer 1: 0",
        "layer 3: 2, 11",
    ]
    assert "silent" not in status_text(StatusReply(view, members[2:], []))


def test_status_shows_how_the_pipeline_runs() -> None:
    infos = [WorkerInfo(role, role, "10.0.0.1", 11, "h") for role in ("attention", "ffn")]
    view = ClusterView("c" * 32, 7, 1, 1, 1, "smol", "h", "hybrid", Plan(), [])
    stats = [
        {"running": 3.0, "bubble": 0.0625, "exposed": 0.012, "gang_size": 1.75},
        {"bubble": 0.3, "gang_size": 1.75, "straggler": 0.02},
    ]
    members = [MemberStatus(Member(info, 0), 0.1, 1.0, own) for info, own in zip(infos, stats, strict=True)]
    text = status_text(StatusReply(view, members, []))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    begin = rows.index("PIPELINE (last 10 s) BUBBLE EXPOSED TRANSFER GANG WORST STRAGGLER")
    assert rows[begin + 1 : begin + 3] == ["attention/0 6.2% 1.2% 1.75 -", "ffn/0 30.0% - 1.75 2.0%"]
    assert "attention/0 3 running" in rows, "what the table shows is not shown twice"
    assert "PIPELINE" not in status_text(StatusReply(view, [MemberStatus(Member(infos[0], 0), 0.1, 1.0, {})], []))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["bench", "--concurrency", "x"], "afd bench: error: argument --concurrency: 'x' is not a whole number"),
        (["bench", "--num-warmups", "-1"], "-1 is negative"),
        (["simulate", "--topology", "1A1F", "--requests", "1.5"], "'1.5' is not a whole number"),
        (["simulate", "--topology", "1A1F", "--rate", "-1"], "-1 is not a positive number"),
        (["simulate", "--topology", "1A1F", "--gang-window-ms", "inf"], "inf is not a number of at least 0"),
        (["simulate", "--topology", "1A1F", "--range-ratio", "1"], "1 is not in [0, 1)"),
        (["plan", "cost", "--context", "0"], "afd plan cost: error: argument --context: 0 is not at least 1"),
        (["plan", "--sla-tpot-ms", "soon"], "'soon' is not a number"),
        (["plan", "--attention-dtype", "fp9"], "'fp9' is not one of auto, fp8, int8, bf16"),
        (["plan", "tgs"], "required: --topology (see afd plan tgs --help)"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["stauts"], "; did you mean status? (see afd --help)"),
        (
            ["up", "--topolgy", "2A2F"],
            "afd up: error: unrecognized arguments: --topolgy 2A2F; did you mean --topology?",
        ),
        (["up", "--topolgy=2A2F"], "did you mean --topology? (see afd up --help)"),
        (["up", "--device", "cdua"], "did you mean cuda?"),
        (["k8s", "render", "--releese", "x"], "did you mean --release? (see afd k8s render --help)"),
        (["status", "what"], "afd status: error: unrecognized arguments: what (see afd status --help)"),
    ],
)
def test_a_flag_that_cannot_be_read_costs_one_line(argv, complaint, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert complaint in captured.err and captured.err.count("\n") == 1


def test_without_a_command_the_help_is_shown(capsys) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: afd")


@pytest.mark.parametrize("command", EVERY)
def test_every_flag_has_words(command: str, capsys) -> None:
    for flag in FLAGS:
        assert len(flag.help) > 5, flag.name
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "model:" in text and "log:" in text, "in groups"


LOADED = {
    "attention": {"running": 256.0, "waiting": 1000.0, "kv_free": 0.02, "busy_s": 1e6, "wait_s": 1e6, "step_ms": 49.9,
                  "cycle_ms": 48.0, "streams": 3.0, "refused": 123456.0},
    "ffn": {"busy_s": 53.7, "wait_s": 3.2, "batches": 1.567e8, "tokens": 9.9e9},
    "gateway": {"running": 256.0, "queued": 1000.0, "finished": 1e5, "tpot_p99_ms": 49.9, "ttft_p99_ms": 4999.0,
                "tpot_met": 1.0, "ttft_met": 1.0},
}  # fmt: skip


def test_the_load_fits_80_columns() -> None:
    view = ClusterView("c" * 32, 7, 1, 1, 1, "smol", "h", "hybrid", Plan(), [])
    members = [
        MemberStatus(
            Member(WorkerInfo(role, role, "127.0.0.1", 1234567, "h", metrics="127.0.0.1:65535"), 0), 0.1, 1.0, own
        )
        for role, own in LOADED.items()
    ]
    text = status_text(StatusReply(view, members, []))
    assert max(map(len, text.splitlines())) <= 80, text
    assert "256 running, 1000 waiting, KV 98%, step 49.9 ms, 123456 refused" in text


def test_what_is_only_observed_is_not_called_refused() -> None:
    text = load_text({"running": 1.0, "over_sla": 12.0})
    assert text == "1 running, 12 beyond the SLA (admitted)"


@pytest.mark.parametrize(("flags", "threads"), [((), 8), (("--share-host",), 2)])
def test_workers_of_one_host_share_its_cores(
    flags: tuple[str, ...], threads: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers of one host without a CPU limit each see all of its cores."""
    monkeypatch.setattr("afd.cluster.resolve.usable_cores", lambda: 8)
    arguments = ("attention", "--dry-run", "--topology", "2A2F", "--model", MODEL, "--coordinator", "h:1")
    assert main([*arguments, *flags]) == 0
    assert f"threads = {threads}\n" in capsys.readouterr().out

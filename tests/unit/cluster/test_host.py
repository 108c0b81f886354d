"""What touches the host: pipes and their frames, the run file, the secret file, threads and ports."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from afd.cluster import resolve
from afd.cluster.launch import RoleLaunch, parse_news, read_launch, write_launch, write_news
from afd.cluster.launcher import MAX_LINE_BYTES, Lines
from afd.cluster.process import describe_exit, role_environment
from afd.cluster.run_file import (
    PARTIAL,
    RunInfo,
    new_run_file,
    process_start_time,
    remove_run_file,
    run_directory,
    running_clusters,
    write_run_file,
)
from afd.cluster.secret_file import new_secret, read_secret, require_secret
from afd.config import ClusterConfig, resolve_config
from afd.errors import ConfigError, ModelError
from tests.unit.model.model_files import STEP3_TINY


@pytest.fixture
def pipe() -> object:
    read_fd, write_fd = os.pipe()
    fds = [read_fd, write_fd]
    yield fds
    for fd in fds:
        os.close(fd)


# --- frames ---------------------------------------------------------------------------------------------


def test_a_launch_frame_survives_the_pipe(pipe: list[int]) -> None:
    launch = RoleLaunch("ffn", 3, ClusterConfig(), "ab" * 16, announce_fd=7, supervisor_pid=1)
    write_launch(pipe[1], launch)
    assert read_launch(pipe[0]) == launch
    assert launch.name == "ffn/3" and RoleLaunch("coordinator", -1, ClusterConfig(), "").name == "coordinator"


def test_a_supervisor_that_goes_away_first_is_no_error(pipe: list[int]) -> None:
    os.write(pipe[1], b"\x10\x00\x00\x00{")
    os.close(pipe.pop())
    assert read_launch(pipe[0]) is None


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x02\x00\x00\x00{}", b"\x03\x00\x00\x00abc"])
def test_something_else_on_standard_input_is_named(pipe: list[int], data: bytes) -> None:
    os.write(pipe[1], data)
    with pytest.raises(ConfigError, match="launch frame"):
        read_launch(pipe[0])


def test_news_are_lines_and_broken_ones_are_none(pipe: list[int]) -> None:
    write_news(pipe[1], {"loading": 0.5, "what": "é"})
    assert parse_news(os.read(pipe[0], 4096)) == {"loading": 0.5, "what": "é"}
    assert parse_news(b'{"load') == {} and parse_news(b"3") == {} and parse_news(b"\xff") == {}
    with pytest.raises(ValueError, match="bytes"):
        write_news(pipe[1], {"error": "x" * 5000})


def test_news_to_a_dead_supervisor_are_nobodys_business(pipe: list[int]) -> None:
    os.close(pipe.pop(0))
    write_news(pipe[0], {"ready": True})


def test_lines_are_split_cut_and_finished(pipe: list[int]) -> None:
    os.set_blocking(pipe[0], False)
    lines = Lines(pipe[0], 10)
    os.write(pipe[1], b"one\ntw")
    assert list(lines.read()) == [b"one"]
    os.write(pipe[1], b"o\n" + b"x" * 25)
    assert list(lines.read()) == [b"two", b"x" * 10], "an overlong line is cut, not collected"
    os.write(pipe[1], b"\nlast")
    assert list(lines.read()) == [b""] and not lines.ended
    os.close(pipe.pop())
    assert list(lines.read()) == [b"last"] and lines.ended
    assert list(lines.read()) == []


def test_a_role_environment_bounds_thread_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert role_environment(3)["OMP_NUM_THREADS"] == "3"
    assert role_environment(3)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert role_environment(0)["OMP_WAIT_POLICY"] == "ACTIVE", "what the user sets stays"
    assert MAX_LINE_BYTES >= 4096


def test_exits_in_words() -> None:
    assert [describe_exit(code) for code in (1, -9, -200)] == [
        "exit code 1",
        "killed by SIGKILL",
        "killed by signal 200",
    ]


# --- run file -------------------------------------------------------------------------------------------


@pytest.fixture
def run_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of everybody's, and no other place for run files."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run_info(pid: int = 0, started: int = 0) -> RunInfo:
    pid = pid or os.getpid()
    return RunInfo(pid, started or process_start_time(pid), "127.0.0.1:1", "ab", "http://x", "1A1F", "m")


def test_a_run_file_is_private_found_and_gone(run_base: Path) -> None:
    assert running_clusters() == [] and list(run_base.iterdir()) == [], "looking leaves nothing behind"
    path = new_run_file()
    write_run_file(path, run_info())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    write_run_file(path, run_info())  # again, with the URL
    assert running_clusters() == [run_info()]
    path.with_suffix(PARTIAL).touch()  # killed while it wrote the file again
    remove_run_file(path)
    remove_run_file(path)
    assert running_clusters() == [] and list(run_base.iterdir()) == []


def test_files_of_dead_supervisors_and_garbage_are_not_clusters(run_base: Path) -> None:
    path = new_run_file()
    write_run_file(path, run_info(pid=os.getpid(), started=1))  # this pid, but another process
    assert running_clusters() == [] and not path.exists()
    write_run_file(path, run_info())  # its directory went with the dead one's file
    path.with_name("1.json").write_bytes(b"{")
    assert running_clusters() == [run_info()]
    assert process_start_time(2**22 + 1) == 0


def readable_by_others(name: Path) -> None:
    name.mkdir(mode=0o755)


def link_to_elsewhere(name: Path) -> None:
    (name.parent / "elsewhere").mkdir(mode=0o700)
    name.symlink_to(name.parent / "elsewhere")


def of_another_user(name: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a directory away")
    name.mkdir(mode=0o700)
    os.chown(name, 65534, 65534)


@pytest.mark.parametrize("take", [readable_by_others, of_another_user, link_to_elsewhere, Path.touch])
def test_where_the_name_is_taken_a_fresh_directory_serves_and_is_found(
    shared: Path, take: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    taken = run_directory()
    take(taken)
    before = sorted(shared.rglob("*"))
    path = new_run_file()
    assert path.parent.parent == shared and path.parent != taken
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    [record] = caplog.records
    assert str(taken) in record.getMessage() and str(path.parent) in record.getMessage()
    write_run_file(path, run_info())
    assert running_clusters() == [run_info()]
    remove_run_file(path)
    assert running_clusters() == [] and sorted(shared.rglob("*")) == before


def test_what_others_leave_under_our_names_is_not_read(shared: Path) -> None:
    for name in (run_directory(), run_directory().with_name(f"afd-{os.getuid()}-foreign")):
        name.mkdir(mode=0o700)
        (name / f"{os.getpid()}.json").write_bytes(msgspec.json.encode(run_info()))
        assert running_clusters() == [run_info()]
        name.chmod(0o777)
        assert running_clusters() == []


def test_where_nothing_can_be_made_it_says_what_to_do(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared / "missing"))
    with pytest.raises(ConfigError, match=r"no private directory for the run file: .*set XDG_RUNTIME_DIR"):
        new_run_file()
    assert running_clusters() == []


def test_a_name_taken_meanwhile_is_not_written_to(run_base: Path) -> None:
    path = new_run_file()
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match=f"cannot write run file {path}: not private"):
        write_run_file(path, run_info())
    assert list(path.parent.iterdir()) == []


def test_without_a_runtime_directory_the_temporary_one_is_used(shared: Path) -> None:
    assert run_directory() == shared / f"afd-{os.getuid()}"


# --- secret file ----------------------------------------------------------------------------------------


def test_a_secret_is_read_without_white_space(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("  0123456789abcdef\n")
    path.chmod(0o600)
    assert read_secret(str(path)) == b"0123456789abcdef"
    assert len(new_secret()) >= 16 and new_secret() != new_secret()


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000])
def test_a_useless_secret_is_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="make one"):
        read_secret(str(path))


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_secret(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--secret-file is needed"):
        require_secret("")


def test_a_secret_that_everyone_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 32)
    path.chmod(0o644)
    read_secret(str(path))
    assert "chmod 600" in caplog.text
    assert "can be guessed" in caplog.text


# --- threads, model, ports ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "cores", "share"), [("1A1F", 2, 1), ("1A1F", 8, 4), ("2A3F", 16, 3), ("4A4F", 2, 1), ("mono", 6, 6)]
)
def test_threads_are_a_fair_share(topology: str, cores: int, share: int) -> None:
    config = resolve.share_threads(resolve_config(None, {"cluster.topology": topology}), cores)
    assert (config.attention.threads, config.ffn.threads) == (share, share)


@pytest.mark.parametrize(
    ("topology", "cores", "attention", "ffn"),
    [("1A1F", 2, 2, 2), ("2A1F", 2, 1, 2), ("2A3F", 16, 8, 5), ("4A4F", 2, 1, 1), ("mono", 6, 6, 6)],
)
def test_workers_of_a_role_share_all_cores_while_the_other_role_waits(
    topology: str, cores: int, attention: int, ffn: int
) -> None:
    config = resolve.share_threads(resolve_config(None, {"cluster.topology": topology}), cores)
    assert (config.attention.threads_alone, config.ffn.threads_alone) == (attention, ffn)
    assert resolve.most_threads(config, "attention") == max(config.attention.threads, attention)
    assert resolve.most_threads(config, "ffn") == max(config.ffn.threads, ffn)
    assert resolve.most_threads(config, "gateway") == 1


def test_threads_that_were_given_stay() -> None:
    alone = resolve_config(None, {"attention.threads_alone": 1, "ffn.threads": 5})
    assert resolve.share_threads(alone, 4).attention.threads_alone == 1
    assert resolve.share_threads(alone, 4).ffn.threads_alone == 5
    config = resolve_config(None, {"attention.threads": 3})
    assert resolve.share_threads(config, 8).attention.threads == 3
    whole = resolve.whole_host_threads(config, 8)
    assert (whole.attention.threads, whole.ffn.threads) == (3, 8)
    assert resolve.usable_cores() >= 1


def test_the_model_is_found_early_and_named() -> None:
    config, folder = resolve.find_model(resolve_config(None, {"model.name": "dummy:llama-tiny"}))
    assert config.model.served_name == folder.name
    named = resolve_config(None, {"model.name": "dummy:llama-tiny", "model.served_name": "mine"})
    assert resolve.find_model(named)[0].model.served_name == "mine"
    with pytest.raises(ModelError, match="nothing-here"):
        resolve.find_model(resolve_config(None, {"model.name": "/nothing-here"}))
    with pytest.raises(ConfigError, match="do not fit a message to a worker"):
        resolve.find_model(resolve_config(None, {"model.name": "dummy:llama-tiny", "attention.max_waiting": 1 << 21}))


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"gateway: port {port} on 127.0.0.1 is in use; choose another with --port"
        ):
            resolve.check_ports(resolve_config(None, {"gateway.port": port}))
        with pytest.raises(ConfigError, match=f"coordinator: port {port}"):
            config = {"coordinator.address": f"127.0.0.1:{port}", "gateway.port": 0}
            resolve.check_ports(resolve_config(None, config))
    resolve.check_ports(resolve_config(None, {"gateway.port": port}))


def test_addresses_that_cannot_be_listened_on_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        resolve.check_port("203.0.113.1", 8000, "gateway", "")


def test_one_fixed_port_cannot_serve_two_workers() -> None:
    config = {"cluster.topology": "1A2F", "ffn.mesh_port": 7000, "gateway.port": 0}
    with pytest.raises(ConfigError, match=r"ffn.mesh_port = 7000 cannot serve 2 processes"):
        resolve.check_ports(resolve_config(None, config))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {"coordinator.address": "127.0.0.1:{port}"},
            "coordinator: port {port} is asked for by gateway already; choose",
        ),
        ({"coordinator.metrics_port": "{port}"}, "coordinator metrics: port {port} is asked for by gateway already"),
        ({"attention.port": "{port}"}, "attention.port: port {port} is asked for by gateway already; use 0"),
        ({"ffn.mesh_port": "{port}", "ffn.host": "127.0.0.1"}, "ffn.mesh_port: port {port} is asked for by gateway"),
    ],
)
def test_one_port_for_two_is_said_before_anything_starts(config: dict[str, str], complaint: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    filled = {key: value.format(port=port) for key, value in config.items()}
    values = {key: int(value) if value.isdigit() else value for key, value in filled.items()}
    with pytest.raises(ConfigError, match=complaint.format(port=port)):
        resolve.check_ports(resolve_config(None, {"gateway.port": port, **values}))


def test_a_privileged_port_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(resolve.socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:80: .*below 1024 are root's; choose another"):
        resolve.check_ports(resolve_config(None, {"gateway.port": 80}))


@pytest.mark.parametrize("address", ["127.0.0.1:65536", "127.0.0.1:²", "127.0.0.1:-1", "127.0.0.1:", ":7070"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"coordinator\.address"):
        resolve_config(None, {"coordinator.address": address})


def test_a_tokenizer_that_cannot_be_served_is_said_with_the_model(tmp_path: Path) -> None:
    """Before any worker starts to load."""
    folder = shutil.copytree(STEP3_TINY, tmp_path / "model")
    config = resolve_config(None, {"model.name": str(folder)})
    resolve.find_model(config)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        resolve.find_model(config)

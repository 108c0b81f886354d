"""The configuration: defaults, file, overrides, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afd.cli.show import config_toml
from afd.config import ClusterConfig, config_from_json, config_to_toml_dict, resolve_config
from afd.errors import ConfigError
from afd.types import Topology


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return str(path)


def test_defaults_need_no_file() -> None:
    assert resolve_config(None, {}) == ClusterConfig()


def test_a_file_sets_and_an_override_wins(tmp_path: Path) -> None:
    file = write(tmp_path, '[cluster]\ntopology = "2A1F"\n[gateway]\nport = 9\n')
    config = resolve_config(file, {"gateway.port": 10, "sla.tpot_ms": 20})
    assert (config.topology, config.gateway.port, config.sla.tpot_ms) == (Topology(2, 1), 10, 20.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway]\nprot = 1\n", r"unknown key gateway\.prot; keys of \[gateway\]: host, advertise_host, port"),
        ("[gatway]\nport = 1\n", r"unknown section \[gatway\]; sections: model, cluster"),
        ("gateway = 1\n", r"gateway must be a section \(\[gateway\]\)"),
        ('[gateway]\nport = "eight"\n', r"Expected `int`, got `str` - at `gateway\.port`"),
        ("[gateway]\nport = 70000\n", r"gateway\.port"),
        ("[sla]\ntpot_ms = 0\n", r"sla\.tpot_ms"),
        ('[model]\ndtype = "int4"\n', r"model\.dtype"),
        ("[attention]\nmin_chunk_tokens = 512\n", "min_chunk_tokens must not exceed attention.max_step_tokens"),
        ('[coordinator]\naddress = "nowhere"\n', "'nowhere' is not host:port"),
        ('[coordinator]\naddress = "::1:7070"\n', "'::1:7070': an IPv6 address stands in brackets"),
        ('[cluster]\ntopology = "mono"\ntransport = "tcp"\n', "mono has no transport"),
        ('[cluster]\ntopology = "mono"\nwire = "fp8"\n', "mono sends no rows"),
        ('[cluster]\ntopology = "mono"\ndispatch = "sparse"\n', "mono sends no rows"),
        ('[cluster]\ndispatch = "dense"\n', r"cluster\.dispatch"),
        ("[cluster]\nranks_per_instance = 8\n", "ranks_per_instance"),
        ("not toml", "is not valid TOML"),
        (f"[gateway]\nmax_queue = {10**12}\n", r"gateway\.max_queue"),
        (f"[gateway]\nreader_processes = {10**6}\n", r"gateway\.reader_processes"),
        (f"[attention]\nthreads = {10**6}\n", r"attention\.threads"),
        ('[attention]\ncores = "0-99999999999"\n', r"attention\.cores: '0-99999999999' is neither"),
        (f"[ffn]\ncores = '{'9' * 5000}'\n", r"ffn\.cores"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_config(write(tmp_path, text), {})


def test_an_override_of_an_unknown_key_is_named_too() -> None:
    with pytest.raises(ConfigError, match=r"unknown key model\.nmae"):
        resolve_config(None, {"model.nmae": "x"})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config file"):
        resolve_config(str(tmp_path / "missing.toml"), {})
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve_config(str(path), {})


@pytest.mark.parametrize("topology", ["", "0A1F", "1A0F", "A1F", "1a", "1A1F1", "-1A1F", "129A1F", "10000A1F"])
def test_topologies_that_are_none(topology: str) -> None:
    with pytest.raises(ConfigError, match="topology"):
        resolve_config(None, {"cluster.topology": topology})


def test_graphs_are_a_gpus() -> None:
    with pytest.raises(ConfigError, match=r"attention\.cuda_graphs needs attention\.device 'cuda', not 'cpu'"):
        resolve_config(None, {"attention.cuda_graphs": True})
    assert resolve_config(None, {"attention.cuda_graphs": True, "attention.device": "cuda"}).attention.cuda_graphs


def test_a_child_gets_exactly_what_was_resolved() -> None:
    config = resolve_config(None, {"cluster.topology": "2a3f", "model.dtype": "float32"})
    assert config_from_json(msgspec.json.encode(config)) == config
    with pytest.raises(ConfigError, match="handed to this process"):
        config_from_json(b'{"gateway": {"prot": 1}}')


def test_the_printed_toml_gives_the_same_configuration(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {
        "model.name": 'a "quoted" ü\\path',
        "cluster.checksum": True,
        "ffn.gang_window_ms": 0.5,
    }
    config = resolve_config(None, overrides)
    text = config_toml(config)
    assert tomllib.loads(text) == config_to_toml_dict(config)
    assert resolve_config(write(tmp_path, text), {}) == config


@pytest.mark.parametrize("value", [float("inf"), 1e30, float("nan")])
@pytest.mark.parametrize("key", ["coordinator.lost_after_s", "gateway.request_timeout_s", "cluster.recovery_timeout_s"])
def test_times_that_no_clock_can_hold_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve_config(None, {key: value})


def test_a_file_nested_without_end_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        resolve_config(str(path), {})

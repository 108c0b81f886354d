"""Flags are names for configuration keys: one table; defaults and choices live in `afd.config` alone."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afd.config import ClusterConfig, resolve_config
from afd.errors import ConfigError

UP, COORDINATOR, ATTENTION, FFN, GATEWAY = "up", "coordinator", "attention", "ffn", "gateway"
EVERY = (UP, COORDINATOR, ATTENTION, FFN, GATEWAY)
COMPUTE = (UP, ATTENTION, FFN)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of the command line that sets keys of the configuration.

    name: as typed.
    keys: the configuration keys that it sets.
    commands: which sub-commands take it.
    """

    name: str
    keys: tuple[str, ...]
    help: str
    commands: tuple[str, ...]
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None

    @property
    def dest(self) -> str:
        return "key:" + ",".join(self.keys)


FLAGS = (
    Flag("--model", ("model.name",), "the default's name, a Hugging Face folder, a .gguf file or dummy:PRESET", EVERY),
    Flag("--served-model-name", ("model.served_name",), "what clients call it", EVERY, metavar="NAME"),
    Flag("--dtype", ("model.dtype",), "compute dtype", EVERY, choices=("float32", "bfloat16")),
    Flag("--max-context", ("model.max_context",), "tokens per request, 0 = the model's own", EVERY, int, metavar="N"),
    Flag("--topology", ("cluster.topology",), "xAyF, such as 2A1F, or mono", EVERY),
    Flag(
        "--standby-ffn",
        ("cluster.standby_ffn",),
        "FFN workers to replace a lost one",
        (UP, COORDINATOR),
        int,
        metavar="N",
    ),
    Flag("--transport", ("cluster.transport",), "of the data plane", COMPUTE, choices=("auto", "shm", "verbs", "tcp")),
    Flag("--ffn-parallel", ("cluster.ffn_parallel",), "cut of an FFN layer", EVERY, choices=("hybrid", "tp", "ep")),
    Flag("--dispatch", ("cluster.dispatch",), "rows sent to FFN", (UP, ATTENTION), choices=("broadcast", "sparse")),
    Flag("--secret-file", ("cluster.secret_file",), "the cluster's secret, the same file everywhere", EVERY),
    Flag("--checksum", ("cluster.checksum",), "checksum of every payload", COMPUTE, choices=("true", "false")),
    Flag("--streams", ("attention.streams",), "micro-batches in flight, 0 = auto", (UP, ATTENTION), int, metavar="N"),
    Flag(
        "--max-num-seqs", ("attention.max_num_seqs",), "running requests per worker", (UP, ATTENTION), int, metavar="N"
    ),
    Flag("--max-step-tokens", ("attention.max_step_tokens",), "tokens of a micro-batch", COMPUTE, int, metavar="N"),
    Flag("--kv-cache-gib", ("attention.kv_cache_gib",), "KV cache per worker", (UP, ATTENTION), float, metavar="GIB"),
    Flag("--threads", ("attention.threads", "ffn.threads"), "per worker, 0 = a fair share", (UP,), int, metavar="N"),
    Flag("--threads", ("attention.threads",), "0 = all cores of this host", (ATTENTION,), int, metavar="N"),
    Flag("--threads", ("ffn.threads",), "0 = all cores of this host", (FFN,), int, metavar="N"),
    Flag("--cores", ("attention.cores",), "of the main thread, such as 0,2-3", (ATTENTION,), metavar="LIST"),
    Flag("--cores", ("ffn.cores",), "of the main thread, such as 0,2-3", (FFN,), metavar="LIST"),
    Flag("--device", ("attention.device", "ffn.device"), "cpu or cuda", (UP,), choices=("cpu", "cuda")),
    Flag("--device", ("attention.device",), "cpu or cuda", (ATTENTION,), choices=("cpu", "cuda")),
    Flag("--device", ("ffn.device",), "cpu or cuda", (FFN,), choices=("cpu", "cuda")),
    Flag("--coordinator", ("coordinator.address",), "host:port of it", (ATTENTION, FFN, GATEWAY), metavar="HOST:PORT"),
    Flag("--listen", ("coordinator.address",), "where to listen", (COORDINATOR,), metavar="HOST:PORT"),
    Flag("--tls-cert-file", ("coordinator.tls_cert_file",), "PEM, shown to the other roles", (COORDINATOR,)),
    Flag("--tls-key-file", ("coordinator.tls_key_file",), "PEM, of the certificate", (COORDINATOR,)),
    Flag("--tls-ca-file", ("coordinator.tls_ca_file",), "PEM, CA of the coordinator", (ATTENTION, FFN, GATEWAY)),
    Flag("--host", ("gateway.host",), "address to listen on", (UP, GATEWAY)),
    Flag("--port", ("gateway.port",), "HTTP port, 0 = any", (UP, GATEWAY), int),
    Flag("--advertise-host", ("gateway.advertise_host",), "as `afd status` shows it", (GATEWAY,)),
    Flag("--host", ("attention.host",), "address to listen on", (ATTENTION,)),
    Flag("--advertise-host", ("attention.advertise_host",), "as the others reach it, if not --host", (ATTENTION,)),
    Flag("--port", ("attention.port",), "serving port (ZeroMQ), 0 = any", (ATTENTION,), int),
    Flag("--mesh-port", ("attention.mesh_port",), "data plane's TCP port, 0 = any", (ATTENTION,), int, metavar="PORT"),
    Flag("--host", ("ffn.host",), "address to listen on", (FFN,)),
    Flag("--advertise-host", ("ffn.advertise_host",), "as the others reach it, if not --host", (FFN,)),
    Flag("--mesh-port", ("ffn.mesh_port",), "data plane's TCP port, 0 = any", (FFN,), int, metavar="PORT"),
    Flag("--metrics-port", ("coordinator.metrics_port",), "0 = any", (COORDINATOR,), int, metavar="PORT"),
    Flag("--metrics-port", ("attention.metrics_port",), "0 = any", (ATTENTION,), int, metavar="PORT"),
    Flag("--metrics-port", ("ffn.metrics_port",), "0 = any", (FFN,), int, metavar="PORT"),
    Flag(
        "--generation-config",
        ("gateway.generation_config",),
        "the model's own sampling defaults",
        (UP, GATEWAY),
        choices=("auto", "none"),
    ),
    Flag("--api-keys-file", ("gateway.api_keys_file",), "one key a line", (UP, GATEWAY), metavar="FILE"),
    Flag("--sla-tpot-ms", ("sla.tpot_ms",), "time per output token, p99", (UP, ATTENTION, GATEWAY), float),
    Flag("--sla-ttft-ms", ("sla.ttft_ms",), "time to first token", (UP, ATTENTION, GATEWAY), float),
    Flag(
        "--sla-policy",
        ("sla.policy",),
        "refuse what would miss the targets, or only measure",
        (UP, ATTENTION, GATEWAY),
        choices=("enforce", "observe", "off"),
    ),
    Flag(
        "--log-level", ("log.level",), "the least that is logged", EVERY, choices=("debug", "info", "warning", "error")
    ),
    Flag("--log-format", ("log.format",), "json: one object a line", EVERY, choices=("text", "json")),
)


_GROUPS = {
    "model": "model",
    "cluster": "cluster",
    "attention": "workers",
    "ffn": "workers",
    "coordinator": "coordinator",
    "gateway": "HTTP API",
    "sla": "service level",
    "log": "log",
}
"""Headings of --help, by the section of a flag's key."""


def add_config_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags of one sub-command, with --config and --set, which reach every key."""
    parser.add_argument("--config", metavar="FILE", help="TOML file that declares the cluster; flags override it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any configuration key, such as attention.block_size=32 (repeatable)",
    )
    defaults = ClusterConfig()
    titles = dict.fromkeys(_GROUPS[flag.keys[0].partition(".")[0]] for flag in FLAGS if command in flag.commands)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for flag in FLAGS:
        if command in flag.commands:
            section, key = flag.keys[0].split(".")
            value = getattr(getattr(defaults, section), key)
            default = str(value).lower() if isinstance(value, bool) else value if value != "" else "none"
            metavar = flag.metavar or (None if flag.choices else flag.name.rpartition("-")[2].upper())
            groups[_GROUPS[section]].add_argument(
                flag.name,
                dest=flag.dest,
                type=flag.type,
                choices=flag.choices,
                metavar=metavar,
                default=None,
                help=f"{flag.help} (default: {default})".strip(),
            )


def config_from_args(args: argparse.Namespace, planned: dict[str, Any] | None = None) -> ClusterConfig:
    """File, then what is planned, then flags, then --set -> the resolved configuration; ConfigError otherwise."""
    config = resolve_config(args.config, {**(planned or {}), **keys_from_args(args)})
    args.log_format = config.log.format  # of a later error, too
    return config


def keys_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Keys that flags and --set give, by name."""
    overrides: dict[str, Any] = {}
    for dest, value in vars(args).items():
        if dest.startswith("key:") and value is not None:
            for key in dest.removeprefix("key:").split(","):
                overrides[key] = {"true": True, "false": False}.get(value, value)
    for setting in args.set:
        overrides.update([_parse_setting(setting)])
    return overrides


def _parse_setting(setting: str) -> tuple[str, Any]:
    """ "a.b=1" -> ("a.b", 1): the value is TOML, or else a plain string."""
    path, equals, text = setting.partition("=")
    path = path.strip()
    if not equals or path.count(".") != 1 or not all(path.split(".")):
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    try:
        return path, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return path, text

"""The whole cluster's configuration: declared once here, resolved once by the CLI, passed down unchanged.

A TOML file has these sections and keys; a flag overrides a key; an unknown key is an error. `ClusterConfig` is
what every process gets (`afd up --dry-run` prints it). Times are in seconds unless the name says otherwise.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from afd.errors import ConfigError
from afd.types import MAX_STREAMS, DispatchMode, FfnParallel, Topology

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]  # finite: clocks and waits must take it
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
WILDCARD_HOSTS = frozenset({"0.0.0.0", "::", "[::]", "*"})

ANY_CORE = "any"
"""In place of a list of cores: the kernel decides."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: frozen, unknown keys refused."""


class Listener(Section, frozen=True):
    """host: where to listen.  advertise_host: what the others are told to connect to (a pod's IP, a container's name);
    "" = host. Needed where host is a wildcard.
    """

    host: str = "127.0.0.1"
    advertise_host: str = ""

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host

    def reachable(self, bound: str) -> str:
        """ "host:port" for the others; bound: "host:port" or "tcp://host:port" of a socket that listens."""
        return f"{self.reachable_host}:{bound.rpartition(':')[2]}"


class ModelConfig(Section, frozen=True):
    """name: "smollm2-135m-instruct", a Hugging Face folder, or "dummy:<preset>".

    max_context: 0 = the model's own.  served_name: what clients call it; "" = derived from `name`.
    weights: auto = in dtype, int8 = those of the FFN rounded to 8 bits when loaded, a scale for each output channel,
    int8-all = attention projections (but MLA's) and the LM head too.
    """

    name: str = "smollm2-135m-instruct"
    served_name: str = ""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: Literal["auto", "int8", "int8-all"] = "auto"
    max_context: NonNegativeInt = 0


class TopologyConfig(Section, frozen=True):
    """topology: xAyF or mono.  transport: of the data plane; auto = shared memory on one host, RDMA between hosts that
    both have an active port (verbs), else TCP.

    wire: type of the rows from attention to FFN; auto = model.dtype, fp8 = e4m3 with a scale for each 128 columns.
    Answers come back in model.dtype, or in bf16 or fp32 where that is set.

    dispatch: which rows an FFN rank is sent at an MoE layer; sparse = only those that it works on, for ffn_parallel ep
    and, where the model has no shared expert, hybrid.

    recovery_timeout_s: how long requests wait for a lost worker's return or its successor, which has to load its half
    of the model, before they end with an error.
    """

    topology: str = "1A1F"
    ranks_per_instance: Literal[1] = 1
    transport: Literal["auto", "shm", "verbs", "tcp"] = "auto"
    wire: Literal["auto", "fp8", "bf16", "fp32"] = "auto"
    ffn_parallel: FfnParallel = FfnParallel.HYBRID
    dispatch: DispatchMode = DispatchMode.BROADCAST
    checksum: bool = False
    secret_file: str = ""  # "" with `afd up`: a fresh secret for this run, handed to the children by pipe
    recovery_timeout_s: Positive = 60.0


class VerbsConfig(Section, frozen=True):
    """RDMA connections of the data plane: `stepmesh.config.VerbsOptions`, key for key (docs/rdma.md).

    device: "mlx5_0" or "mlx5_0:2"; "" = chosen.  near: PCI address of the GPU whose nearest port is wanted.
    gid_index: -1 = RoCE v2, IPv4 first.  mtu_bytes: 0 = what both ports have.
    """

    device: str = ""
    near: str = ""
    gid_index: Annotated[int, msgspec.Meta(ge=-1, le=255)] = -1
    mtu_bytes: Literal[0, 256, 512, 1024, 2048, 4096] = 0
    service_level: Annotated[int, msgspec.Meta(ge=0, le=15)] = 0
    traffic_class: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    timeout: Annotated[int, msgspec.Meta(ge=0, le=31)] = 14
    retry_count: Annotated[int, msgspec.Meta(ge=0, le=7)] = 6
    rnr_retry: Annotated[int, msgspec.Meta(ge=0, le=7)] = 6


class AttentionConfig(Listener, frozen=True):
    """streams: 0 = auto (up to the plan's maximum).  num_blocks: 0 = as many as kv_cache_gib holds.

    max_step_tokens: tokens of one micro-batch (decodes first, then prefill).  max_num_seqs: running requests.
    threads: 0 = a fair share of the machine's cores.  threads_alone: while the FFN workers wait for this one (one
    stream); 0 = `afd up` shares out this host's cores among the workers of a role, elsewhere `threads`.
    cores: of the main thread, such as "0,2-3"; "any" = the kernel
    decides; "" = `afd up` shares out this host's, where each worker can have one.
    cuda_graphs: with device cuda, a layer of a decode step is captured once for each size and replayed
    (docs/operations.md, GPUs).
    modelled: not "" = no model: a step takes base_ms + token_us * tokens + context_us * KV entries read, tokens are
    hashes, such as "base_ms=4,token_us=150,context_us=0.2" (topology mono; for tests of everything but the model).
    """

    streams: Annotated[int, msgspec.Meta(ge=0, le=MAX_STREAMS)] = 0
    max_step_tokens: PositiveInt = 256
    min_chunk_tokens: PositiveInt = 8
    max_num_seqs: PositiveInt = 256
    max_waiting: PositiveInt = 1024
    block_size: Literal[8, 16, 32, 64] = 32
    num_blocks: NonNegativeInt = 0
    kv_cache_gib: Positive = 2.0
    prefix_cache: bool = True
    threads: NonNegativeInt = 0
    threads_alone: NonNegativeInt = 0
    cores: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    cuda_graphs: bool = False
    modelled: str = ""
    port: Port = 0  # ZeroMQ; 0 = any
    mesh_port: Port = 0
    metrics_port: Port = 0


class FfnConfig(Listener, frozen=True):
    """threads, threads_alone, cores: as of attention.

    gang_window_ms: upper bound of the wait for other attention workers at layer 0 (a quarter of a step at most).
    """

    threads: NonNegativeInt = 0
    threads_alone: NonNegativeInt = 0
    cores: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    gang_window_ms: Annotated[float, msgspec.Meta(ge=0, le=100)] = 10.0
    mesh_port: Port = 0
    metrics_port: Port = 0


class CoordinatorConfig(Section, frozen=True):
    """address: host:port of the coordinator, as the other roles reach it (port 0 with `afd up`: any).

    stall_timeout_s: a process whose main loop stands still for so long although work waits is lost, to the coordinator
    and to its peers in the data plane; so is an attention worker, to a gateway that has not heard of it for so long.

    tls_*: PEM files; the coordinator shows certificate and key, the other roles trust the CA. All "" = plain text.
    """

    address: str = "127.0.0.1:0"
    heartbeat_s: Positive = 0.25
    lost_after_s: Positive = 2.5
    stall_timeout_s: Positive = 5.0
    restart_grace_s: Positive = 5.0
    register_timeout_s: Positive = 600.0  # a worker gives up when no coordinator answers for so long at start
    metrics_port: Port = 0
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_ca_file: str = ""


class GatewayConfig(Listener, frozen=True):
    """Limits protect the process: every one is answered with 400 or 503 and its name.

    allowed_hosts: names, with commas, under which clients may reach a gateway without keys. "" = those of this host
    where it listens on loopback, else any.
    generation_config: auto = what a request leaves out is sampled as the model's publisher recommends
    (generation_config.json); none = as OpenAI does, temperature 1 and no filter.
    """

    port: Port = 8000
    api_keys_file: str = ""
    allowed_hosts: str = ""
    max_connections: PositiveInt = 4096
    generation_config: Literal["auto", "none"] = "auto"
    max_queue: PositiveInt = 1024
    max_request_tokens: PositiveInt = 1 << 20
    max_body_bytes: PositiveInt = 8 << 20
    max_n: PositiveInt = 16
    max_stop: PositiveInt = 4
    reader_processes: PositiveInt = 3
    request_timeout_s: Positive = 600.0
    lease_s: Positive = 3.0
    drain_s: Positive = 10.0
    sse_keepalive_s: Positive = 15.0


class SlaConfig(Section, frozen=True):
    """policy: enforce = refuse what would break the target; observe = measure only; off."""

    tpot_ms: Positive = 50.0
    ttft_ms: Positive = 5000.0
    policy: Literal["enforce", "observe", "off"] = "observe"


class LogConfig(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class ClusterConfig(Section, frozen=True):
    """The resolved whole."""

    model: ModelConfig = ModelConfig()
    cluster: TopologyConfig = TopologyConfig()
    verbs: VerbsConfig = VerbsConfig()
    attention: AttentionConfig = AttentionConfig()
    ffn: FfnConfig = FfnConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    gateway: GatewayConfig = GatewayConfig()
    sla: SlaConfig = SlaConfig()
    log: LogConfig = LogConfig()

    @property
    def topology(self) -> Topology:
        return Topology.parse(self.cluster.topology)


def resolve_config(file: str | None, overrides: dict[str, Any]) -> ClusterConfig:
    """TOML file (optional) plus overrides such as {"model.name": "..."} -> ClusterConfig; ConfigError otherwise."""
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read config file {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"config file {file} is not valid TOML: {error}") from error
    for path, value in overrides.items():
        section, key = path.split(".")
        table = tree.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    where = f"{file}: " if file is not None else ""
    _check_keys(tree, where)
    try:
        config = msgspec.convert(tree, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}{str(error).replace('$.', '')}") from error
    check_config(config)
    return config


def _check_keys(tree: dict[str, Any], where: str) -> None:
    """An unknown section or key is named together with those that exist; ConfigError."""
    sections = {field.name: field.type for field in msgspec.structs.fields(ClusterConfig)}
    for section, table in tree.items():
        if section not in sections:
            raise ConfigError(f"{where}unknown section [{section}]; sections: {', '.join(sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}{section} must be a section ([{section}]), not a value")
        keys = [field.name for field in msgspec.structs.fields(sections[section])]
        for key in table:
            if key not in keys:
                raise ConfigError(f"{where}unknown key {section}.{key}; keys of [{section}]: {', '.join(keys)}")


def check_config(config: ClusterConfig) -> None:
    """Rules that span keys; ConfigError names both."""
    topology = config.topology
    if config.attention.min_chunk_tokens > config.attention.max_step_tokens:
        raise ConfigError("attention.min_chunk_tokens must not exceed attention.max_step_tokens")
    host, _, port = config.coordinator.address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"coordinator.address {config.coordinator.address!r} is not host:port")
    if 3 * config.coordinator.heartbeat_s > config.coordinator.lost_after_s:
        raise ConfigError("coordinator.lost_after_s must be at least three times coordinator.heartbeat_s")
    if bool(config.coordinator.tls_cert_file) != bool(config.coordinator.tls_key_file):
        raise ConfigError("coordinator.tls_cert_file and coordinator.tls_key_file belong together: set both")
    for name, section in (("attention", config.attention), ("ffn", config.ffn)):
        try:
            parse_cores(section.cores)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from error
        if section.host in WILDCARD_HOSTS and not section.advertise_host:
            raise ConfigError(
                f"{name}.host {section.host} is no address that others can connect to: set {name}.advertise_host too"
            )
    if config.attention.cuda_graphs and config.attention.device != "cuda":
        raise ConfigError(f"attention.cuda_graphs needs attention.device 'cuda', not {config.attention.device!r}")
    if config.attention.modelled and not topology.mono:
        raise ConfigError(f"attention.modelled has no FFN side: use cluster.topology 'mono', not {topology}")
    if topology.mono and config.cluster.transport != "auto":
        raise ConfigError("topology mono has no transport; leave cluster.transport at auto")
    if topology.mono and config.cluster.wire != "auto":
        raise ConfigError("topology mono sends no rows; leave cluster.wire at auto")
    if topology.mono and config.cluster.dispatch is not DispatchMode.BROADCAST:
        raise ConfigError("topology mono sends no rows; leave cluster.dispatch at broadcast")


def parse_cores(text: str) -> set[int]:
    """ "0,2-3" -> {0, 2, 3}; none for "" and "any". ConfigError for anything else."""
    if text in ("", ANY_CORE):
        return set()
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ConfigError(f"cores: {text!r} is neither a list of core numbers such as 0,2-3 nor {ANY_CORE!r}")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def config_to_toml_dict(config: ClusterConfig) -> dict[str, Any]:
    """The resolved values as plain builtins (what --dry-run prints and children get as JSON)."""
    builtins: dict[str, Any] = msgspec.to_builtins(config)
    return builtins


def config_from_json(data: bytes | str) -> ClusterConfig:
    """Inverse of `msgspec.json.encode(config)`: how a child process gets the resolved configuration."""
    try:
        return msgspec.json.decode(data, type=ClusterConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"bad configuration handed to this process: {error}") from error

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
from afd.types import MAX_STREAMS, DispatchMode, FfnParallel, Topology, host_port

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]  # finite: clocks and waits must take it
MAX_COUNT = 1 << 31
MAX_THREADS = 1024
MAX_CORE_DIGITS = 5
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
NumThreads = Annotated[int, msgspec.Meta(ge=0, le=MAX_THREADS)]
WILDCARD_HOSTS = frozenset({"0.0.0.0", "::", "[::]", "*"})

ANY_CORE = "any"
"""In place of a list of cores: the kernel decides."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: frozen, unknown keys refused. docs/configuration.md is made of what stands below."""


class Listener(Section, frozen=True):
    """A role that others connect to."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    advertise_host: str = ""
    """What the others are told to connect to (a pod's IP, a container's name); "" = host. Needed where host is a
    wildcard."""

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host

    def reachable(self, bound: str) -> str:
        """ "host:port" for the others; bound: "host:port" or "tcp://host:port" of a socket that listens."""
        return host_port(self.reachable_host, bound.rpartition(":")[2])


class ModelConfig(Section, frozen=True):
    """What is served."""

    name: str = "smollm2-135m-instruct"
    """`smollm2-135m-instruct`, a Hugging Face folder, a .gguf file, or `dummy:<preset>`."""
    served_name: str = ""
    """What clients call it; "" = derived from `name`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations; the residual is float32 in any case."""
    weights: Literal["auto", "int8", "int8-all"] = "auto"
    """How weights are held. auto = in dtype; int8 = those of the FFN rounded to 8 bits when loaded, a scale for each
    output channel; int8-all = attention projections (but MLA's) and the LM head too."""
    max_context: NonNegativeInt = 0
    """Tokens of prompt and output together; 0 = the model's own limit."""


class TopologyConfig(Section, frozen=True):
    """What all workers have in common."""

    topology: str = "1A1F"
    """xAyF = x attention and y FFN workers, or mono = both halves in one process."""
    standby_ffn: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """FFN workers that hold every shard of the model in memory, and take over at once from one that is lost."""
    ranks_per_instance: Literal[1] = 1
    """Ranks (devices) of one worker instance."""
    transport: Literal["auto", "shm", "verbs", "tcp"] = "auto"
    """What carries rows between workers. auto = shared memory on one host, RDMA between hosts that both have an active
    port (verbs), else TCP."""
    wire: Literal["auto", "fp8", "bf16", "fp32"] = "auto"
    """Type of the rows from attention to FFN. auto = model.dtype, fp8 = e4m3 with a scale for each 128 columns. Answers
    come back in model.dtype, or in bf16 or fp32 where that is set."""
    ffn_parallel: FfnParallel = FfnParallel.HYBRID
    """How FFN workers share a layer. hybrid = routed experts whole, dense FFN and shared expert sliced; tp = everything
    sliced; ep = routed experts whole, the shared expert whole on each for its share of the rows."""
    dispatch: DispatchMode = DispatchMode.BROADCAST
    """Which rows an FFN worker is sent at an MoE layer. sparse = only those that it works on, for ffn_parallel ep and,
    where the model has no shared expert, hybrid."""
    checksum: bool = False
    """Whether every frame carries a CRC-32."""
    secret_file: str = ""
    """The cluster's secret. "" with `afd up` = a fresh one for this run, handed to the children by pipe."""
    recovery_timeout_s: Positive = 60.0
    """How long requests wait for a lost worker's return or its successor, which has to load its half of the model,
    before they end with an error."""


class VerbsConfig(Section, frozen=True):
    """RDMA connections of the data plane: `stepmesh.config.VerbsOptions`, key for key ([rdma](rdma.md))."""

    device: str = ""
    """Device, and port if not the first one: `mlx5_0` or `mlx5_0:2`; "" = chosen."""
    near: str = ""
    """PCI address of the GPU whose nearest port is wanted."""
    gid_index: Annotated[int, msgspec.Meta(ge=-1, le=255)] = -1
    """Index of the port's address; -1 = RoCE v2, IPv4 first."""
    mtu_bytes: Literal[0, 256, 512, 1024, 2048, 4096] = 0
    """Largest packet; 0 = what both ports have."""
    service_level: Annotated[int, msgspec.Meta(ge=0, le=15)] = 0
    """Service level of InfiniBand, and priority of RoCE where traffic_class does not set it."""
    traffic_class: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    """Traffic class of the IP header, with the DSCP in its upper six bits."""
    timeout: Annotated[int, msgspec.Meta(ge=0, le=31)] = 14
    """A packet without an acknowledgement is sent again after 4.096 us * 2^timeout (14: 67 ms)."""
    retry_count: Annotated[int, msgspec.Meta(ge=0, le=7)] = 6
    """How often a packet is sent again before the connection fails."""
    rnr_retry: Annotated[int, msgspec.Meta(ge=0, le=7)] = 6
    """How often a packet is sent again where the peer has no receive posted (ours always has)."""


class AttentionConfig(Listener, frozen=True):
    """Attention workers."""

    streams: Annotated[int, msgspec.Meta(ge=0, le=MAX_STREAMS)] = 0
    """Micro-batches in flight; 0 = chosen, up to the plan's maximum."""
    max_step_tokens: PositiveInt = 256
    """Tokens of one micro-batch: decodes first, then prefill."""
    min_chunk_tokens: PositiveInt = 8
    """Prefill tokens of a step once prompts have waited, even where the SLA leaves none; of each further prompt at
    least so many."""
    max_num_seqs: PositiveInt = 256
    """Running requests of a worker."""
    max_waiting: PositiveInt = 1024
    """Admitted requests of a worker that wait for room."""
    block_size: Literal[8, 16, 32, 64] = 32
    """Tokens of a block of the KV cache."""
    num_blocks: NonNegativeInt = 0
    """Blocks of the KV cache; 0 = as many as kv_cache_gib holds."""
    kv_cache_gib: Positive = 2.0
    """Size of the KV cache in GiB, where num_blocks is 0."""
    prefix_cache: bool = True
    """Whether requests share the KV blocks of common prefixes."""
    threads: NumThreads = 0
    """Threads that compute; 0 = a fair share of the machine's cores."""
    threads_alone: NumThreads = 0
    """Threads that compute while the FFN workers wait for this one (one stream); 0 = `afd up` shares out this host's
    cores among the workers of a role, elsewhere `threads`."""
    cores: str = ""
    """Cores that the main thread may use, such as `0,2-3`; `any` = the kernel decides; "" = `afd up` shares out this
    host's cores, where each worker can have one."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What computes."""
    cuda_graphs: bool = False
    """Whether, with device cuda, a layer of a decode step is captured once for each size and replayed
    ([GPUs](operations.md#gpus))."""
    modelled: str = ""
    """A model of times alone, for tests of everything else (topology mono): tokens are hashes, and a step takes base_ms
    + token_us * tokens + context_us * KV entries read. Such as `base_ms=4,token_us=150,context_us=0.2`; "" = off."""
    port: Port = 0
    """Port at which gateways connect (ZeroMQ); 0 = any."""
    mesh_port: Port = 0
    """Port at which other workers connect (data plane); 0 = any."""
    metrics_port: Port = 0
    """Port of metrics, probes and traces; 0 = any."""


class FfnConfig(Listener, frozen=True):
    """FFN workers."""

    threads: NumThreads = 0
    """Threads that compute; see `attention.threads`."""
    threads_alone: NumThreads = 0
    """Threads that compute while all attention workers wait for this one; see `attention.threads_alone`."""
    cores: str = ""
    """Cores that the main thread may use; see `attention.cores`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What computes."""
    gang_window_ms: Annotated[float, msgspec.Meta(ge=0, le=100)] = 10.0
    """Upper bound of the wait for other attention workers at layer 0 (a quarter of a step at most)."""
    mesh_port: Port = 0
    """Port at which other workers connect (data plane); 0 = any."""
    metrics_port: Port = 0
    """Port of metrics, probes and traces; 0 = any."""


class CoordinatorConfig(Section, frozen=True):
    """Membership. The coordinator shows TLS certificate and key, the other roles trust the CA; all "" = plain text."""

    address: str = "127.0.0.1:0"
    """host:port of the coordinator, as the other roles reach it (port 0 with `afd up` = any)."""
    heartbeat_s: Positive = 0.25
    """Time between two heartbeats of a member."""
    lost_after_s: Positive = 2.5
    """A member without heartbeats for so long is lost; at least three heartbeats."""
    stall_timeout_s: Positive = 5.0
    """A process whose main loop stands still for so long although work waits is lost, to the coordinator and to its
    peers in the data plane; so is an attention worker to a gateway that has not heard of it for so long."""
    restart_grace_s: Positive = 5.0
    """After its own start the coordinator waits so long before it declares anybody lost."""
    register_timeout_s: Positive = 600.0
    """A member gives up when no coordinator answers for so long at its start."""
    metrics_port: Port = 0
    """Port of metrics and probes; 0 = any."""
    tls_cert_file: str = ""
    """The coordinator's certificate (PEM)."""
    tls_key_file: str = ""
    """The coordinator's private key (PEM)."""
    tls_ca_file: str = ""
    """Certificates of the authorities that the other roles trust (PEM)."""


class GatewayConfig(Listener, frozen=True):
    """HTTP. Limits protect the process: what is beyond one is answered with 400 or 503 and the limit's name."""

    port: Port = 8000
    """Port of the HTTP API; 0 = any."""
    api_keys_file: str = ""
    """File of API keys, one a line; "" = everybody is served."""
    allowed_hosts: str = ""
    """Names, with commas, under which clients may reach a gateway without keys. "" = those of this host where it
    listens on loopback, else any."""
    max_connections: PositiveInt = 4096
    """Client connections at a time."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto = what a request leaves out is sampled as the model's publisher recommends (generation_config.json); none =
    as OpenAI does, temperature 1 and no filter."""
    max_queue: PositiveInt = 1024
    """Choices of requests that wait for a place at a worker."""
    max_request_tokens: PositiveInt = 1 << 20
    """Prompt tokens of all choices of one request together; at least a context is allowed."""
    max_body_bytes: PositiveInt = 8 << 20
    """Bytes of one request's body."""
    max_waiting_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 256 << 20
    """Bytes of all bodies that are being received or wait to be read; at least one of the largest is allowed."""
    max_n: PositiveInt = 16
    """Choices of one request."""
    max_stop: PositiveInt = 4
    """Stop strings of one request."""
    reader_processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3
    """Processes beside the gateway that read and tokenise long requests."""
    request_timeout_s: Positive = 600.0
    """A request ends with an error after so long."""
    lease_s: Positive = 3.0
    """Workers drop the requests of a gateway that they have not heard of for so long."""
    drain_s: Positive = 10.0
    """How long running requests may go on after SIGTERM."""
    sse_keepalive_s: Positive = 15.0
    """Between two comments in a stream that has nothing else to say."""


class SlaConfig(Section, frozen=True):
    """Targets of latency ([sla](sla.md))."""

    tpot_ms: Positive = 50.0
    """Time per output token."""
    ttft_ms: Positive = 5000.0
    """Time to first token."""
    policy: Literal["enforce", "observe", "off"] = "observe"
    """enforce = refuse what would break the target; observe = measure only; off."""


class LogConfig(Section, frozen=True):
    """What every process writes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is written."""
    format: Literal["text", "json"] = "text"
    """json = one object a line."""


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

    @property
    def num_ffn_workers(self) -> int:
        """FFN workers of the cluster, those on standby included."""
        return self.topology.num_ffn + self.cluster.standby_ffn


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
    if ":" in host.strip("[]") and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"coordinator.address {config.coordinator.address!r}: an IPv6 address stands in brackets")
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
    if topology.mono and config.cluster.standby_ffn:
        raise ConfigError("topology mono has no FFN workers; leave cluster.standby_ffn at 0")
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
        numbers = [
            int(number) for number in (first, last or first) if number.isdecimal() and len(number) <= MAX_CORE_DIGITS
        ]
        if len(numbers) < 2 or (dash and not last) or numbers[1] < numbers[0]:
            raise ConfigError(f"cores: {text!r} is neither a list of core numbers such as 0,2-3 nor {ANY_CORE!r}")
        cores.update(range(numbers[0], numbers[1] + 1))
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

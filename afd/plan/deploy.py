"""From a plan to what starts it: what each role needs, the chart's values, `afd up`'s keys, and what stands against it.

Written to `deploy` of `afd plan --json`; read by `afd k8s render --plan` and `afd up --plan`.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec

from afd.errors import ConfigError
from afd.model.loading import DEFAULT_MODEL, DUMMY_PREFIX
from afd.plan.estimate import Estimate, Estimator
from afd.plan.hardware import Chip

CHIP_LABEL = "afd/chip"
"""The label of nodes whose value is the planner's name of their chips; who runs the cluster sets it."""

GIB = 2**30
KV_BYTES = 2.0
"""The workers' KV cache is 16-bit."""
PROCESS_GIB = 2.0
"""Host memory of a worker beside weights and KV cache: the process and its /dev/shm, a GiB each."""


class PlannedRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each worker of one role needs.

    chip: the planner's name of it.  device: as the configuration has it.
    weights_gib, kv_cache_gib: of one worker, on its device.  host_memory_gib: of its pod.
    """

    chip: str
    device: str
    gpus: int
    weights_gib: float
    kv_cache_gib: float
    host_memory_gib: float
    node_selector: dict[str, str]


class Deploy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan as AFD would run it.

    shape: what was planned, a name or a path.  model: where the engine finds it; "" = the plan does not say.
    weights: model.weights.  max_step_tokens, max_num_seqs: of an attention worker.
    obstacles: why AFD cannot run the plan as it is, a line each, with what to plan instead.
    """

    shape: str
    model: str
    topology: str
    streams: int
    dispatch: str
    weights: str
    tpot_ms: float
    max_step_tokens: int
    max_num_seqs: int
    attention: PlannedRole
    ffn: PlannedRole
    obstacles: list[str]

    def with_model(self, model: str | None) -> Deploy:
        """For the files that are named, or found by the plan itself. ConfigError names all that stands against it."""
        obstacles = list(self.obstacles)
        if not (model or self.model):
            obstacles.append(
                f"{self.shape} is a shape of the planner's catalogue, not a model's files: name those with --model"
            )
        if obstacles:
            raise ConfigError(f"this plan of {self.shape} cannot be run: " + "; ".join(obstacles))
        return msgspec.structs.replace(self, model=model or self.model)

    def helm_values(self) -> dict[str, Any]:
        """The chart's values."""
        roles = {"attention": _role_values(self.attention), "ffn": _role_values(self.ffn)}
        roles["attention"] |= {
            "kvCacheGiB": self.attention.kv_cache_gib,
            "maxNumSeqs": self.max_num_seqs,
            "maxStepTokens": self.max_step_tokens,
        }
        values: dict[str, Any] = {
            "topology": self.topology,
            "streams": self.streams,
            "dispatch": self.dispatch,
            "model": {"name": self.model},
            "sla": {"tpotMs": self.tpot_ms},
            **roles,
        }
        if self.weights != "auto":
            values["config"] = {"model": {"weights": self.weights}}
        return values

    def overrides(self) -> dict[str, Any]:
        """Keys of the configuration, for one host with all of its workers."""
        return {
            "model.name": self.model,
            "model.weights": self.weights,
            "cluster.topology": self.topology,
            "cluster.dispatch": self.dispatch,
            "attention.streams": self.streams,
            "attention.device": self.attention.device,
            "attention.kv_cache_gib": self.attention.kv_cache_gib,
            "attention.max_num_seqs": self.max_num_seqs,
            "attention.max_step_tokens": self.max_step_tokens,
            "ffn.device": self.ffn.device,
            "sla.tpot_ms": self.tpot_ms,
        }


def deploy_of(plan: Estimate, estimator: Estimator, shape: str) -> Deploy:
    """shape: the model as `afd plan` was asked for it, a name or a path."""
    deployment, report = plan.deployment, estimator.memory_report(plan)
    context = plan.objective.context
    roles = {
        "attention": (deployment.attention_chip, report["attention"]),
        "ffn": (deployment.ffn_chip, report["ffn"]),
    }
    bytes_per_weight = report["ffn"]["weight_bytes"] * deployment.ffn_ranks / deployment.model.ffn_weights
    obstacles = [line for chip, _ in roles.values() if (line := _device_obstacle(chip))]
    if deployment.ranks_per_instance > 1:
        obstacles.insert(
            0,
            f"its instances have {deployment.ranks_per_instance} chips each and a worker of AFD has one: plan with "
            f"--ranks-per-instance 1",
        )
    if deployment.mixed:
        obstacles.append(
            "a role of it has several kinds of chips, and the chart gives a role one: plan with one each, such as "
            f"--attention {deployment.attention_chip.name} --ffn {deployment.ffn_chip.name}"
        )
    kv_bytes = report["attention"]["kv_bytes"]
    wide = plan.requests_per_chip * deployment.model.kv_resident_bytes(context, KV_BYTES)
    if kv_bytes < 0.99 * wide:
        obstacles.append("its KV cache has fewer than 16 bits and AFD's has 16: plan with --attention-dtype bf16")
    if bytes_per_weight < 0.9:
        obstacles.append("its weights have fewer than 8 bits and AFD's have 8 or 16: plan with --weight-dtype int8")
    planned = {role: _role(chip, memory) for role, (chip, memory) in roles.items()}
    return Deploy(
        shape=shape,
        model=_model_of(shape),
        topology=str(deployment.topology),
        streams=deployment.streams,
        dispatch=str(deployment.dispatch),
        weights="auto" if bytes_per_weight > 1.5 else "int8-all",
        tpot_ms=plan.objective.sla_tpot_s * 1e3,
        max_step_tokens=max(
            256, math.ceil(plan.num_tokens + (0.0 if plan.prefill is None else plan.prefill.num_tokens))
        ),
        max_num_seqs=plan.requests_per_chip,
        attention=planned["attention"],
        ffn=planned["ffn"],
        obstacles=list(dict.fromkeys(obstacles)),
    )


def deploy_payload(plan: Estimate, estimator: Estimator, shape: str) -> dict[str, Any]:
    """`deploy` of the JSON: the plan as AFD would run it, and what to type. Nothing to type where it cannot."""
    deploy = deploy_of(plan, estimator, shape)
    payload: dict[str, Any] = msgspec.to_builtins(deploy)
    if deploy.obstacles:
        return {**payload, "command": None, "helm_yaml": None}
    known = msgspec.structs.replace(deploy, model=deploy.model or "/models/NAME")
    settings = [f"{key}={value}" for key, value in known.overrides().items()]
    command = ["afd", "up", *(word for one in settings for word in ("--set", one))]
    return {**payload, "command": shlex.join(command), "helm_yaml": _yaml(known.helm_values())}


def read_deploy(path: str) -> Deploy:
    """`deploy` of the best plan in the output of `afd plan --json` ("-" = standard input); ConfigError otherwise."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        found = json.loads(data)["deploy"]
        if found is None:
            raise ConfigError(f"{path}: no topology holds the target, so there is nothing to start")
        return msgspec.convert({key: value for key, value in found.items() if key in Deploy.__struct_fields__}, Deploy)
    except OSError as error:
        raise ConfigError(f"cannot read plan {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what `afd plan --json` prints") from error


def _model_of(shape: str) -> str:
    """What the engine would load: the built-in model, a preset, or the folder that the planner read; else ""."""
    if shape == DEFAULT_MODEL or shape.startswith(DUMMY_PREFIX):
        return shape
    path = Path(shape)
    if path.is_file():
        return str(path.resolve().parent)
    return str(path.resolve()) if path.is_dir() else ""


def _device_obstacle(chip: Chip) -> str:
    if chip.device:
        return ""
    return f'nothing is known of what AFD runs on {chip.title}: give it device = "cuda" or "cpu" with --hardware-file'


def _role(chip: Chip, memory: dict[str, float]) -> PlannedRole:
    weights_gib, kv_gib = memory["weight_bytes"] / GIB, memory["kv_bytes"] / GIB
    on_host = weights_gib + kv_gib if chip.device == "cpu" else 0.0
    return PlannedRole(
        chip=chip.name,
        device=chip.device,
        gpus=1 if chip.device == "cuda" else 0,
        weights_gib=round(weights_gib, 2),
        kv_cache_gib=max(0.01, round(kv_gib, 2)) if kv_gib else 0.0,
        host_memory_gib=max(8.0, math.ceil(on_host + PROCESS_GIB)),
        node_selector={CHIP_LABEL: chip.name},
    )


def _role_values(role: PlannedRole) -> dict[str, Any]:
    memory = {"memory": f"{role.host_memory_gib:.0f}Gi"}
    return {
        "device": role.device,
        "gpu": {"count": role.gpus},
        "nodeSelector": role.node_selector,
        "resources": {"requests": memory, "limits": memory},
    }


def _yaml(values: dict[str, Any], indent: str = "") -> str:
    """Block YAML of nested mappings; scalars as JSON, which YAML reads as it is."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)

"""The resolved configuration as text: the TOML that would give it again, and what each process gets."""

from __future__ import annotations

import json
from typing import Any

from afd.config import ClusterConfig, config_to_toml_dict


def config_toml(config: ClusterConfig) -> str:
    """Every key with its resolved value, as a TOML file."""
    lines = []
    for section, table in config_to_toml_dict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    """Sections hold strings, booleans and numbers only: JSON writes these as TOML does."""
    return json.dumps(value, ensure_ascii=False)


def process_table(config: ClusterConfig) -> str:
    """One line for each process of `afd up`."""
    topology = config.topology
    rows = [("coordinator", f"listens on {config.coordinator.address}")]
    for rank in range(topology.num_attention):
        what = "the whole model" if topology.mono else "attention half"
        rows.append((f"attention/{rank}", f"{what}, {config.attention.threads} threads on {config.attention.device}"))
    for rank in range(topology.num_ffn):
        rows.append(
            (
                f"ffn/{rank}",
                f"FFN shard {rank} of {topology.num_ffn}, {config.ffn.threads} threads on {config.ffn.device}",
            )
        )
    rows.append(("gateway/0", f"http://{config.gateway.host}:{config.gateway.port}"))
    return "\n".join(f"{name:<14} {text}" for name, text in rows)

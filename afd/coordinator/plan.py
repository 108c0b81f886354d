"""The pipeline plan that goes with a membership: changes of it are a plan version, never an epoch."""

from __future__ import annotations

import msgspec

from afd.config import ClusterConfig
from afd.messages.membership import Plan

DEFAULT_MAX_STREAMS = 3


def base_plan(config: ClusterConfig) -> Plan:
    """What the configuration asks for, before any worker is known."""
    return Plan(
        version=1,
        max_streams=config.attention.streams or DEFAULT_MAX_STREAMS,
        max_step_tokens=config.attention.max_step_tokens,
        gang_window_s=config.ffn.gang_window_ms / 1e3,
    )


def next_plan(base: Plan, current: Plan, num_attention: int) -> Plan:
    """The plan for `num_attention` workers: `current` itself when nothing changes, else one version later.

    With one attention worker there is nobody to wait for at layer 0, so the gang window is 0.
    """
    wanted = msgspec.structs.replace(
        base,
        version=current.version,
        gang_window_s=base.gang_window_s if num_attention > 1 else 0.0,
    )
    if wanted == current:
        return current
    return msgspec.structs.replace(wanted, version=current.version + 1)

"""A network between both roles that carries less than all their links together: `--oversubscription R`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.stages import dispatch_row_bytes


@dataclass(frozen=True, slots=True)
class Fabric:
    """What all workers share, one resource a direction: seconds in which one row of a micro-batch crosses it, to every
    FFN instance, or back from them.
    """

    to_ffn_s: float
    to_attention_s: float

    @classmethod
    def of(cls, deployment: Deployment, efficiency: Efficiency, oversubscription: float) -> Fabric:
        """A fabric with the bandwidth of the smaller role's links, divided by `oversubscription`."""
        if deployment.one_domain:
            raise ConfigError(
                "--oversubscription: both roles lie in one domain of a fast interconnect, without a network"
            )
        links = min(
            deployment.attention_ranks * deployment.attention_chip.network_bytes_per_s,
            deployment.ffn_ranks * deployment.ffn_chip.network_bytes_per_s,
        )
        copies = deployment.topology.num_ffn * deployment.sent_share()
        seconds_per_byte = copies * oversubscription / (links * efficiency.network) * (1.0 + efficiency.jitter)
        return cls(seconds_per_byte * dispatch_row_bytes(deployment), seconds_per_byte * 2 * deployment.model.hidden)

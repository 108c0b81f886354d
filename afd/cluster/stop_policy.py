"""When the published view itself tells a process to end: a shutdown of the cluster, or its own drain. Pure."""

from __future__ import annotations

from afd.messages.membership import ClusterView


def why_stop(view: ClusterView, role: str, incarnation: str) -> str | None:
    """The reason for this process to stop gracefully now, or None.

    In a shutdown the roles leave in the order in which they need one another: gateways, attention, FFN.
    """
    if view.shutdown:
        waits_for = {"gateway": "", "attention": "gateway", "ffn": "attention"}[role]
        if not waits_for or not view.of_role(waits_for):
            return "the cluster is shutting down"
        return None
    for member in view.members:
        if member.info.incarnation == incarnation and member.draining and role != "ffn":
            return "drain asked by the operator"
    return None

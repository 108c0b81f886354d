"""Prometheus metrics of the coordinator, kept from the published views."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from afd.coordinator.members import ROLES
from afd.messages.membership import ClusterView


class CoordinatorMetrics:
    """Gauges of the newest view. One thread writes (the one that calls the server's `step`)."""

    def __init__(self, registry: CollectorRegistry):
        self._epoch = Gauge("afd_coordinator_epoch", "Epoch of the data plane (0 = not formed yet)", registry=registry)
        self._version = Gauge("afd_coordinator_view_version", "Version of the published view", registry=registry)
        self._formed = Gauge("afd_coordinator_formed", "1 while every FFN rank is present", registry=registry)
        self._members = Gauge("afd_coordinator_members", "Members by role", ["role"], registry=registry)
        self._ready = Gauge("afd_coordinator_members_ready", "Ready members by role", ["role"], registry=registry)
        self._lost = Counter("afd_coordinator_members_lost", "Members declared lost", ["role"], registry=registry)
        for role in ROLES:
            self._lost.labels(role)

    def published(self, view: ClusterView) -> None:
        self._epoch.set(view.epoch)
        self._version.set(view.version)
        self._formed.set(view.formed)
        for role in ROLES:
            members = view.of_role(role)
            self._members.labels(role).set(len(members))
            self._ready.labels(role).set(sum(member.ready for member in members))

    def lost(self, role: str) -> None:
        self._lost.labels(role).inc()

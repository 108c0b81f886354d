"""A membership that a test publishes by hand."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from afd.membership.port import ViewCallback
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo


def ffn_member(rank: int = 0) -> Member:
    """An FFN worker, as the coordinator would publish it."""
    info = WorkerInfo(role="ffn", incarnation=uuid.uuid4().hex, host="127.0.0.1", pid=1, config_hash="fake")
    return Member(info=info, rank=rank, ready=True)


class FakeMembership:
    """Has the parts of `Membership` that a gateway uses."""

    def __init__(self) -> None:
        """Inside a running loop, in which `wait_ready` will be called."""
        self.rank = 0
        self.coordinator_alive = True
        self.published_ready: list[bool] = []
        self._view: ClusterView | None = None
        self._callbacks: list[ViewCallback] = []
        self._version = 0
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def view(self) -> ClusterView | None:
        return self._view

    def on_view(self, callback: ViewCallback) -> None:
        self._callbacks.append(callback)
        if self._view is not None:
            callback(self._view)

    def set_ready(self, ready: bool) -> None:
        self.published_ready.append(ready)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def wait_ready(self, ready: bool = True, timeout_s: float = 10.0) -> None:
        """Wait until the gateway has published this readiness."""
        async with asyncio.timeout(timeout_s):
            while not self.published_ready or self.published_ready[-1] is not ready:
                self._changed.clear()
                await self._changed.wait()

    def publish(self, members: Sequence[Member], *, num_attention: int = 1, shutdown: bool = False) -> ClusterView:
        """A new view with these members (and one FFN worker, unless one is among them)."""
        self._version += 1
        everyone = list(members)
        if not any(member.info.role == "ffn" for member in everyone):
            everyone.append(ffn_member())
        self._view = ClusterView(
            cluster_id="test",
            version=self._version,
            epoch=self._version,
            num_attention=num_attention,
            num_ffn=1,
            model="fake",
            config_hash="fake",
            ffn_parallel="hybrid",
            plan=Plan(),
            members=everyone,
            shutdown=shutdown,
        )
        for callback in self._callbacks:
            callback(self._view)
        return self._view

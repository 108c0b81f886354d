"""The autoscaler's loop: ask the coordinator, decide, tell. Its own process; the cluster never waits for it.

The number of attention workers can change while the cluster serves; the number of FFN workers is the number of the
model's shards and changes with a new topology only. So FFN advice is for people: log, metric, `afd status`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from afd.cluster.autoscale.decision import Adviser, Observation, Recommendation
from afd.cluster.autoscale.metrics import AutoscaleMetrics
from afd.cluster.autoscale.observation import Observer
from afd.cluster.autoscale.scale_target import ScaleError
from afd.errors import CoordinatorError
from afd.messages.membership import ControlReply, ControlRequest, StatusReply

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    """The part of CoordinatorClient that is used here."""

    def status(self) -> StatusReply: ...
    def control(self, request: ControlRequest) -> ControlReply: ...


class Target(Protocol):
    """The part of ScaleTarget that is used here."""

    def replicas(self) -> int: ...
    def set_replicas(self, replicas: int) -> None: ...


class Controller:
    """One round per call of `step`.

    target: scales the attention workers, as many as are best beside the present FFN workers; None = recommend only.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        adviser: Adviser,
        metrics: AutoscaleMetrics,
        *,
        observer: Observer,
        target: Target | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._coordinator = coordinator
        self._adviser = adviser
        self._setter = adviser.for_running()
        self._metrics = metrics
        self._target = target
        self._clock = clock
        self._observer = observer
        self._reachable = False

    def ready(self) -> tuple[bool, str]:
        """Answer of /readyz; any thread may ask."""
        return self._reachable, "the coordinator has not answered"

    def step(self) -> Recommendation | None:
        """One round; None when there is nothing to say (no answer, or the first answer of a worker)."""
        try:
            reply = self._coordinator.status()
        except CoordinatorError as error:
            if self._reachable:
                log.warning("%s; no advice until it answers", error)
            self._reachable = False
            self._metrics.count("unanswered")
            return None
        self._reachable = True
        now = self._clock()
        seen = self._observer.observe(reply, now)
        advice = None
        if seen is not None and reply.view.formed:
            advice = self._adviser.observe(seen, now)
            self._metrics.advised(seen, advice)
            if advice.changed:
                self._tell(seen, advice)
        if self._target is not None:
            self._scale(self._target, seen, None if advice is None or seen is None else self._setter.observe(seen, now))
        return advice

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Run a step every `interval_s` until `stop` is set."""
        self.step()
        while not stop.wait(interval_s):
            self.step()

    def _tell(self, seen: Observation, advice: Recommendation) -> None:
        verdict = "is right" if advice.size == seen.size else f"should be {advice.size}"
        text = f"autoscale: {seen.size} {verdict} ({advice.reason})"
        log.info("%s", text)
        try:
            self._coordinator.control(ControlRequest("note", text))
        except CoordinatorError as error:
            log.warning("the advice is not in `afd status`: %s", error)

    def _scale(self, target: Target, seen: Observation | None, advice: Recommendation | None) -> None:
        """Follow the advice, but never while pods come or go: workers that are missing for a moment (a restart, a lost
        node) must not become the new size. Only what is set below the limit is raised at once: a cluster forms with
        the attention workers of its topology, not with fewer."""
        try:
            current = target.replicas()
            wanted = max(current, self._adviser.limits.smallest.num_attention)
            if seen is not None and advice is not None and seen.size.num_attention == current:
                wanted = advice.size.num_attention
            if wanted == current:
                return
            target.set_replicas(wanted)
        except ScaleError as error:
            log.error("%s", error)
            self._metrics.count("refused")
            return
        log.info("attention workers set from %d to %d", current, wanted)
        self._metrics.count("applied")

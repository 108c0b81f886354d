"""A rank's one opened port: its channels share the protection domain, the completion queue and its event channel."""

from __future__ import annotations

import itertools
import logging
import os

from stepmesh.config import MAX_ATTENTION_RANKS, MeshConfig
from stepmesh.errors import TransportError
from stepmesh.transports.base import ChannelSpec
from stepmesh.transports.verbs import binding
from stepmesh.transports.verbs.base import POLL_BATCH, Verbs
from stepmesh.transports.verbs.channel import SERIAL_SHIFT, VerbsChannel, limits
from stepmesh.transports.verbs.selection import Selection, select
from stepmesh.types import Role

log = logging.getLogger("stepmesh")

_MAX_ROUNDS = 64  # of polling in one go: a flood of completions must not keep the main thread


class VerbsEndpoint:
    """Main thread only. `event_fd` becomes readable after `arm` when something has completed.

    Completions are told apart by the channel's serial in wr_id, not by queue pair number: numbers come back, and
    those of a destroyed queue pair may still lie in the queue.
    """

    def __init__(self, verbs: Verbs, selection: Selection, config: MeshConfig) -> None:
        self.selection = selection
        self._options = config.verbs
        self._probes = config.id.role is Role.FFN
        queues = limits(config.num_streams)
        per_channel = queues.num_writes + queues.num_receives
        num_completions = min(selection.port.max_completions, MAX_ATTENTION_RANKS * per_channel)
        self._max_channels = num_completions // per_channel
        self.adapter = verbs.open(selection.port, num_completions)
        self.event_fd = self.adapter.event_fd
        self._channels: dict[int, VerbsChannel] = {}
        self._serials = itertools.count(1)
        self._armed = False
        log.info("RDMA through %s (%s)", verbs.version, selection.reason)

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    def open_channel(self, spec: ChannelSpec) -> VerbsChannel:
        """This rank's half of a channel. Raises TransportError."""
        if len(self._channels) >= self._max_channels:
            raise TransportError(f"the completion queue of {self.selection.port.device} holds no more pairs")
        serial = next(self._serials)
        channel = VerbsChannel(spec, self, serial, self._options, probes=self._probes)
        self._channels[serial] = channel
        return channel

    def forget(self, serial: int) -> None:
        """The channel is closed."""
        self._channels.pop(serial, None)

    def drain(self) -> bool:
        """Hand completions to their channels; True when there were any."""
        completions = self.adapter.poll()
        if not completions:
            return False
        rounds = 1
        while True:
            for wr_id, status, imm in completions:
                channel = self._channels.get(wr_id >> SERIAL_SHIFT)
                if channel is not None:
                    channel.completed(wr_id, status, imm)
            if len(completions) < POLL_BATCH or rounds == _MAX_ROUNDS:
                return True
            rounds += 1
            completions = self.adapter.poll()

    def arm(self) -> bool:
        """Before blocking: True when something has completed already, and blocking would be wrong."""
        if not self._armed:
            self.adapter.arm()
            self._armed = True
        return self.drain()

    def ring(self) -> None:
        """event_fd is readable."""
        self.adapter.take_event()
        self._armed = False
        self.drain()

    def close(self) -> None:
        """Idempotent. Channels are closed by their owners, before."""
        self.adapter.close()


def open_endpoint(config: MeshConfig, verbs: Verbs | None = None) -> VerbsEndpoint:
    """Choose and open this rank's port. Raises TransportError that says why there is none."""
    speaker = binding.load() if verbs is None else verbs
    options = config.verbs
    near_path = ""
    if options.near:
        near_path = f"/sys/bus/pci/devices/{options.near}"
        if not os.path.exists(near_path):
            raise TransportError(f"verbs.near: this host has no PCI device {options.near}")
        near_path = os.path.realpath(near_path)
    selection = select(speaker.ports(), options, config.advertise_host or config.listen_host, near_path)
    return VerbsEndpoint(speaker, selection, config)

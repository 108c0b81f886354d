"""The scheduler role: the place where workers and servers meet, and nothing else."""

from __future__ import annotations

from stepmesh.compat.environment import Environment
from stepmesh.errors import TransportError
from stepmesh.rendezvous import RendezvousServer


class SchedulerNode:
    """Listens from construction to the end of `stop`."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._server = RendezvousServer(environment.root_host, environment.root_port, environment.key)

    def stop(self) -> None:
        """Wait for all workers and servers to have come and gone, as long as it takes while any of them is there.

        Raises TransportError when they have not all come within the time limit.
        """
        env = self._environment
        expected = (env.num_workers + env.num_servers) * env.group_size
        try:
            if not self._server.wait_come(expected, env.timeout_s):
                raise TransportError(f"not all {expected} processes came to the scheduler within {env.timeout_s:g} s")
            while not self._server.wait_left(expected, env.timeout_s):
                continue  # they serve
        finally:
            self._server.close()

    def close(self) -> None:
        """Leave at once. Idempotent."""
        self._server.close()

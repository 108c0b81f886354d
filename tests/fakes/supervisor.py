"""`afd up`'s supervisor around workers without a model (tests/fakes/role.py).

`python -m tests.fakes.supervisor TOPOLOGY RESTART START [NAME=BEHAVIOUR ...]`. RESTART: "restart" or "no". START:
"forks" (workers come from a fork server) or "spawns".
"""

from __future__ import annotations

import sys
from functools import partial

from afd.cluster import supervisor
from afd.cluster.fork_server import Forked, ForkServer
from afd.cluster.restart import RestartPolicy
from afd.config import resolve_config
from tests.fakes import role as fake
from tests.fakes.warm_process import fork_role


def main(arguments: list[str]) -> int:
    topology, restart, start, *words = arguments
    behaviours = dict(word.split("=") for word in words)
    config = resolve_config(
        None,
        {
            "cluster.topology": topology,
            "gateway.port": 0,
            "gateway.drain_s": 0.2,
            "model.served_name": "fake",
            "coordinator.lost_after_s": 2.0,
            "coordinator.restart_grace_s": 1.0,
            "coordinator.heartbeat_s": 0.05,
        },
    )

    def command(role: str, rank: int) -> list[str]:
        name = f"{role}/{rank}" if rank >= 0 else role
        return [sys.executable, "-m", "tests.fakes.role", role, behaviours.get(name, "serve"), name]

    server = partial(ForkServer, command=[sys.executable, "-m", "tests.fakes.fork_server", *words])
    return supervisor.Supervisor(
        config,
        b"s" * 32,
        restart=partial(RestartPolicy, 0.05, 0.1) if restart == "restart" else None,
        command=command,
        fork_server=server if start == "forks" else None,
    ).run()


def warm(arguments: list[str]) -> int:
    """The same as the main function of a warm process: it forks where it would start an interpreter for a role."""
    supervisor.Spawned = _fork  # type: ignore[assignment, misc]
    return main(arguments)


def _fork(command: list[str], stdin: int, output: int, news: int, *, threads: int) -> Forked:
    role, behaviour, name = command[-3:]
    return fork_role(name, partial(fake.run, role, behaviour), stdin, output, news)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

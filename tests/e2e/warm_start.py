"""`afd up` without the seconds that its processes take to import their libraries (tests/fakes/warm_process.py).

The supervisor is a warm process and forks its roles, where the command would start an interpreter for each. How a
cluster starts by itself is for other tests.
"""

from __future__ import annotations

from functools import partial

from afd.cluster.fork_server import Forked
from tests.fakes.warm_process import fork_role


def up(arguments: list[str]) -> int:
    """The main function of such a warm process."""
    from afd.cli.main import main
    from afd.cluster import fork_server, supervisor

    supervisor.Spawned = _fork
    fork_server.ForkServer = None
    return main(arguments)


def _fork(command: list[str], stdin: int, output: int, news: int, *, threads: int) -> Forked:
    from afd.cli.main import main

    arguments = command[command.index("afd") + 1 :]
    return fork_role(f"{command[-4]} {command[-1]}", partial(main, arguments), stdin, output, news)

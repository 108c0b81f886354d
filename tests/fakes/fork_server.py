"""The fork server of supervisor tests: real but for the workers, which are tests/fakes/role.py's.

`python -m tests.fakes.fork_server [NAME=BEHAVIOUR ...] PID FD`; its own name is "fork-server": "crash", or
"deaf" (imports for ever).
"""

from __future__ import annotations

import os
import sys
import threading

import setproctitle

from afd.cluster.fork_server import run
from tests.fakes import role as fake


def main() -> int:
    behaviours = dict(word.split("=") for word in sys.argv[1:-2])

    def imports() -> None:
        setproctitle.setproctitle("python -m tests.fakes.fork_server serve fork-server")
        match behaviours.get("fork-server"):
            case "crash":
                os._exit(1)
            case "deaf":
                print("the fork server imports for ever", flush=True)
                threading.Event().wait()

    def worker(role: str, rank: int) -> int:
        name = f"{role}/{rank}"
        setproctitle.setproctitle(f"python -m tests.fakes.role {role} {name}")
        return fake.run(role, behaviours.get(name, "serve"))

    return run(imports, worker)


if __name__ == "__main__":
    sys.exit(main())

"""A role process for supervisor tests: the real frame, coordinator and membership around a worker without a model.

`python tests/fakes/role.py ROLE [BEHAVIOUR]`. Behaviours: "serve" (default); "crash" (exit code 1 at once);
"bad-config" (ConfigError); "deaf" (ignores a stop: only a kill ends it).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

from afd.cluster.role_process import run_supervised
from afd.cluster.roles import RoleContext, RoleEntry, run_coordinator_role
from afd.errors import ConfigError
from afd.membership.port import SyncFields
from afd.messages.membership import MeshAddress, WorkerInfo

log = logging.getLogger(__name__)
POLL_S = 0.02


def main() -> int:
    return run(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "serve")


def run(role: str, behaviour: str) -> int:
    serve: dict[str, RoleEntry] = {
        "coordinator": run_coordinator_role,
        "attention": worker,
        "ffn": worker,
        "gateway": gateway,
    }
    behaviours: dict[str, RoleEntry] = {
        "serve": serve[role],
        "crash": crash,
        "bad-config": bad_config,
        "deaf": deaf,
    }
    return run_supervised(role, behaviours[behaviour])


def crash(context: RoleContext) -> int:
    print("about to crash on purpose", file=sys.stderr, flush=True)
    os._exit(1)


def bad_config(context: RoleContext) -> int:
    raise ConfigError("this worker cannot work with that")


def deaf(context: RoleContext) -> int:
    threading.Event().wait()
    return 0


def info(context: RoleContext, role: str) -> WorkerInfo:
    mesh = MeshAddress("", "127.0.0.1", 1) if role != "gateway" else None
    return WorkerInfo(
        role=role,
        incarnation=uuid.uuid4().hex,
        host="127.0.0.1",
        pid=os.getpid(),
        config_hash="same",
        mesh=mesh,
        serving="tcp://127.0.0.1:1" if role == "attention" else "",
    )


def worker(context: RoleContext) -> int:
    """Joins, loads nothing in three steps, is ready, waits for the stop."""
    role = context.name.partition("/")[0]
    membership = context.join(info(context, role), SyncFields)
    try:
        while membership.rank < 0 and not context.stop.wait(POLL_S):
            pass
        for fraction in (0.3, 0.6, 1.0):
            membership.set_loading(fraction)
        if not context.stop.is_set():
            membership.set_ready(True)
            log.info("%s/%d is ready", role, membership.rank)
        context.stop.wait()
    finally:
        membership.close()
    return 0


class _Readyz(BaseHTTPRequestHandler):
    formed = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200 if self.formed.is_set() else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return None


def gateway(context: RoleContext) -> int:
    """An HTTP server that has only /readyz: 200 once the view is formed and all members are ready."""
    membership = context.join(info(context, "gateway"), SyncFields)
    membership.on_view(
        lambda view: (
            _Readyz.formed.set()
            if view.formed and all(m.ready for m in view.members if m.info.role != "gateway")
            else _Readyz.formed.clear()
        )
    )
    port = context.config.gateway.port
    with HTTPServer(("127.0.0.1", port), _Readyz) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        context.announce({"url": f"http://127.0.0.1:{server.server_address[1]}"})
        membership.set_ready(True)
        context.stop.wait()
        server.shutdown()
    membership.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The peer's process: runs one peer with the interpreter of its environment, asked by JSON lines on stdin.

    ENVIRONMENT/bin/python -m bench.compare.worker NAME SETUP

SETUP is a `Setup` as JSON. Answers go to stdout, a line each: {"version": ...} when the peer has started, then for
every {"prompts": [[ids], ...], "output_len": n, "drawing": {...}} a {"seconds": s, "ids": [[...], ...]}. End of stdin
closes the peer.
"""

import json
import os
import sys
import time
from contextlib import closing

from bench.compare.peers import PEERS
from bench.compare.peers.peer import Setup
from bench.drawing import Drawing


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines log to stdout: only answers may go there
    name, setup = sys.argv[1:]
    peer = PEERS[name]()
    version = peer.start(Setup(**json.loads(setup)))
    with closing(peer):
        print(json.dumps({"version": version}), file=out)
        for line in sys.stdin:
            request = json.loads(line)
            begun = time.perf_counter()
            ids = peer.run_round(request["prompts"], request["output_len"], Drawing(**request["drawing"]))
            print(json.dumps({"seconds": time.perf_counter() - begun, "ids": ids}), file=out)


if __name__ == "__main__":  # vLLM starts its engine process by spawning: it imports this module again
    main()

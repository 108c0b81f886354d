"""What a loss costs: a seeded storm of killed and stopped processes over a real cluster under streaming load.

    python -m bench.recovery                                             # 2A1F, 10 killed attention workers
    python -m bench.recovery --topology 2A1F,3A2F --kills 50 --roles attention,ffn,coordinator,both --seed 7
    python -m bench.recovery --topology 2A2F --roles ffn --hows stop:1,stop:5
    python -m bench.recovery --topology 1A2F --roles ffn --up="--standby-ffn 1"

Real processes (`afd up`, float32), real HTTP. The next loss comes when the cluster is whole again, or, for the share
`--haste`, without waiting for that. Every token is compared with an undisturbed run of the same model, in this process.
Then, for each kind of loss: streams that ended in an error or were refused, wrong tokens; pauses of the streams that
were concerned (for an attention worker its own, for an FFN worker all, for a coordinator none); the longest gap of the
others, beside that of the undisturbed time before the storm (streams in windows of 3 s); the longest wait for a first
token of requests that were sent meanwhile; and how long the cluster took to be whole. Losses during which this process
itself could not run for a quarter of a second count, but are not measured. The last line is one JSON object.

Exit code 1 when a stream was lost or refused, a token is wrong, or the cluster did not become whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict

from afd.types import Topology
from bench.local import BenchCluster
from bench.storm.plan import draw_losses
from bench.storm.run import Load, Storm, run_storm
from bench.storm.undisturbed import Undisturbed

NUM_ERRORS = 12


def measure(args: argparse.Namespace, topology: str, undisturbed: Undisturbed) -> Storm:
    """One topology's storm; its log lies in a file if asked for."""
    losses = draw_losses(
        Topology.parse(topology), args.kills, args.seed, args.roles.split(","), args.hows.split(","), args.haste
    )
    flags = ["--topology", topology, "--model", args.model, "--dtype", "float32", "--log-level", "debug"]
    load = Load(num_users=args.streams, num_tokens=args.tokens, calm_s=args.calm_s, patience_s=args.patience_s)
    with BenchCluster(*flags, *shlex.split(args.up)) as cluster:
        try:
            return run_storm(cluster, undisturbed, losses, load, lambda text: print(text, flush=True))
        finally:
            if args.log:
                with open(f"{args.log}.{topology}", "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in cluster.lines)


def row(topology: str, storm: Storm) -> dict[str, object]:
    return {
        "topology": topology,
        "streams": len(storm.streams),
        "errors": storm.errors,
        "wrong_tokens": storm.num_wrong,
        "different_streams": storm.num_different,
        "ended": storm.ended,
        "undisturbed_max_gap_s": max(storm.undisturbed_s, default=0.0),
        "lines": [asdict(line) for line in storm.lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="2A1F", help="one or several: 2A1F,3A2F")
    parser.add_argument("--kills", type=int, default=10, help="losses for each topology")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--roles", default="attention", help="lost together: attention,ffn,coordinator,both,ffn+ffn,attention/0"
    )
    parser.add_argument("--hows", default="kill", help="kill,stop:SECONDS,keep:SECONDS (successors are killed too)")
    parser.add_argument("--haste", type=float, default=0.0, help="share of losses that do not wait for recovery")
    parser.add_argument("--model", default="tests/fixtures/step3-tiny", help="any that afd up takes")
    parser.add_argument("--streams", type=int, default=8, help="clients, each with one stream at a time")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--calm-s", type=float, default=10.0, help="undisturbed, before the first loss")
    parser.add_argument("--patience-s", type=float, default=90.0, help="for the cluster to be whole again")
    parser.add_argument("--up", default="", help="further flags of afd up")
    parser.add_argument("--log", default="", help="the cluster's log goes to FILE.TOPOLOGY")
    args = parser.parse_args()
    undisturbed = Undisturbed(args.model)
    rows, failed = [], False
    for topology in args.topology.split(","):
        storm = measure(args, topology, undisturbed)
        print(f"\n{topology}, seed {args.seed}\n{storm.text}")
        print("\n".join(storm.errors[:NUM_ERRORS]), flush=True)
        rows.append(row(topology, storm))
        unhealed = sum(line.num_unhealed for line in storm.lines)
        failed = failed or bool(storm.errors or storm.num_wrong or storm.ended or unhealed)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"bench": "recovery", **vars(args), "rows": rows, "machine": machine}))
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""`afd k8s render`: the chart's objects as plain manifests, for `kubectl apply -f -`."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("k8s", help="Kubernetes manifests", description="Kubernetes manifests.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    render = actions.add_parser(
        "render",
        help="print the manifests of a release",
        description="Render the Helm chart to plain manifests: `afd k8s render --topology 2A2F | kubectl apply -f -`.",
    )
    render.add_argument("--topology", metavar="xAyF", help="such as 2A2F")
    render.add_argument("--model", metavar="NAME", help="as in model.name of the values")
    render.add_argument("--release", default="afd", metavar="NAME", help="names begin with it (default: afd)")
    render.add_argument("--namespace", default="default", metavar="NAME", help="default: default")
    render.add_argument("--plan", metavar="FILE", help="the best plan of `afd plan --json` (- = stdin)")
    render.add_argument("--values", action="append", default=[], metavar="FILE", help="YAML, as helm's (repeatable)")
    render.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as helm's (repeatable)")
    render.add_argument("--chart", metavar="DIR", help="default: k8s/afd of the sources")
    render.set_defaults(func=run_render)


def run_render(args: argparse.Namespace) -> int:
    from afd.cluster.chart import SECRET_KEY, Render, find_chart, find_helm, render
    from afd.plan.deploy import CHIP_LABEL, read_deploy

    plan = read_deploy(args.plan).with_model(args.model) if args.plan else None
    values: dict[str, Any] = plan.helm_values() if plan is not None else {}
    wanted = Render(args.release, args.namespace, values, files=args.values, settings=args.set)
    # Nothing can be looked up here, so a drawn secret would differ each time: refer to one that exists.
    values.setdefault("secret", {}).setdefault("existingSecret", wanted.default_secret)
    if args.topology:
        values["topology"] = args.topology
    if args.model:
        values.setdefault("model", {})["name"] = args.model
    text = render(find_helm(), find_chart(args.chart), wanted)
    sys.stdout.buffer.write(text.encode())  # YAML is UTF-8, whatever the locale
    sys.stdout.flush()
    if f'secretName: "{wanted.default_secret}"\n' in text:
        literal = f'--from-literal={SECRET_KEY}="$(head -c 32 /dev/urandom | base64)"'
        create = f"kubectl -n {args.namespace} create secret generic {wanted.default_secret} {literal}"
        print(f"afd: the manifests refer to a Secret; make it once: {create}", file=sys.stderr)
    if plan is not None:
        chips = sorted({plan.attention.chip, plan.ffn.chip})
        label = ", ".join(f"{CHIP_LABEL}={chip}" for chip in chips)
        print(f"afd: workers run on nodes labelled with their chip ({label}); set the labels once", file=sys.stderr)
    return 0

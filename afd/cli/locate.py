"""Which cluster a command talks to: an explicit coordinator, or the `afd up` that runs on this host."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afd.config import resolve_config
from afd.errors import ConfigError

if TYPE_CHECKING:
    from afd.membership.client import CoordinatorClient


@dataclass(frozen=True, slots=True)
class Located:
    """A coordinator and the secret to call it with. url: of the gateway, when known."""

    coordinator: str
    secret: bytes
    url: str = ""
    ca_file: str = ""

    def client(self) -> CoordinatorClient:
        """A new client, which the caller closes."""
        from afd.membership.client import CoordinatorClient
        from afd.messages.keys import grpc_token

        return CoordinatorClient(self.coordinator, grpc_token(self.secret), ca_file=self.ca_file)


def add_locate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="default: the `afd up` running on this host")
    parser.add_argument("--secret-file", metavar="FILE", help="the cluster's secret (with --coordinator)")
    parser.add_argument("--tls-ca-file", metavar="FILE", help="CA of the coordinator (with --coordinator)")
    parser.add_argument("--config", metavar="FILE", help="the cluster's TOML file, instead of the three flags above")
    parser.add_argument("--pid", type=int, help="process id of the `afd up` meant, when several run here")


def locate(args: argparse.Namespace) -> Located:
    """ConfigError when there is none, or more than one and none is named."""
    from afd.cluster.secret_file import require_secret

    if args.config:
        if args.coordinator:
            raise ConfigError("--config and --coordinator both say where the coordinator is: give one")
        config = resolve_config(args.config, {})
        if config.coordinator.address.endswith(":0"):
            raise ConfigError(f"{args.config}: coordinator.address must say where the coordinator listens")
        secret = require_secret(args.secret_file or config.cluster.secret_file)
        return Located(config.coordinator.address, secret, ca_file=args.tls_ca_file or config.coordinator.tls_ca_file)
    if args.coordinator:
        return Located(args.coordinator, require_secret(args.secret_file or ""), ca_file=args.tls_ca_file or "")
    return locate_local(args.pid)


def locate_local(pid: int | None) -> Located:
    """The cluster of an `afd up` on this host."""
    from afd.cluster.run_file import running_clusters

    clusters = [info for info in running_clusters() if pid is None or info.pid == pid]
    if not clusters:
        raise ConfigError(
            f"no `afd up` {'with pid ' + str(pid) + ' ' if pid else ''}runs on this host for this user; "
            f"for another host give --coordinator and --secret-file"
        )
    if len(clusters) > 1:
        choices = ", ".join(
            f"{info.pid} ({info.topology} {info.model} at {info.url or 'starting'})" for info in clusters
        )
        raise ConfigError(f"several clusters run on this host; choose one with --pid: {choices}")
    info = clusters[0]
    return Located(info.coordinator, bytes.fromhex(info.secret), info.url, info.ca_file)

"""The chips that a question is about: an inventory, and another network than the data sheet's."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from afd.errors import ConfigError
from afd.plan.catalog import find
from afd.plan.hardware import Chip


def parse_inventory(text: str, catalog: Mapping[str, Chip]) -> dict[str, int]:
    """ "h20:32,h800:16" -> chips by name. ConfigError on an unknown chip, a count below 1 or a chip named twice."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, colon, count = (piece.strip() for piece in part.partition(":"))
        if not colon or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"--inventory {text!r}: expected CHIP:COUNT, such as h20:32,h800:16")
        if name in found:
            raise ConfigError(f"--inventory {text!r}: {name} is there twice")
        find(dict(catalog), name, "chip")
        found[name] = int(count)
    return found


def with_network(catalog: Mapping[str, Chip], text: str | None) -> dict[str, Chip]:
    """Every chip behind a link of that many Gbit/s: "12.5" of its own, or "100/server", shared by a server's chips."""
    if text is None:
        return dict(catalog)
    number, slash, unit = text.partition("/")
    try:
        gbit = float(number)
    except ValueError:
        gbit = 0.0
    if not 0 < gbit < float("inf") or (slash and unit not in ("chip", "server")):
        raise ConfigError(f"--network-gbit {text!r}: expected Gbit/s per chip, or a server's: 100/server")
    shared = unit == "server"
    return {
        name: msgspec.structs.replace(chip, network_gbit_per_s=gbit / (chip.chips_per_server if shared else 1))
        for name, chip in catalog.items()
    }

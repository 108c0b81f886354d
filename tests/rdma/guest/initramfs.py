"""A small initramfs: busybox, the kernel modules that are wanted with what they depend on, an init script.

Needs neither kmod nor depmod: a module names what it depends on in its .modinfo section.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path

FOLDERS = ("bin", "dev", "proc", "sys", "modules", "host", "layer", "writable", "root")
ASKED_FOR_BY_NAME = {"rdma_rxe": ("crc32_generic", "crc32_pclmul")}  # at run time: no symbol tells
DIRECTORY, CHARACTER_DEVICE, EXECUTABLE, LINK, PLAIN = 0o040755, 0o020600, 0o100755, 0o120777, 0o100644


def write_initramfs(target: Path, busybox: Path, modules: Path, init: Path, wanted: Iterable[str]) -> None:
    """Raises FileNotFoundError for a module that this kernel has neither built in nor as a file."""
    archive = Archive()
    for folder in FOLDERS:
        archive.add(folder, DIRECTORY)
    archive.add("dev/console", CHARACTER_DEVICE, device=(5, 1))
    archive.add("bin/busybox", EXECUTABLE, busybox.read_bytes())
    archive.add("bin/sh", LINK, b"busybox")
    archive.add("init", EXECUTABLE, init.read_bytes())
    for number, path in enumerate(loading_order(modules, wanted)):
        archive.add(f"modules/{number:03d}-{path.name}", PLAIN, path.read_bytes())
    target.write_bytes(gzip.compress(archive.finish(), 6, mtime=0))


def loading_order(folder: Path, wanted: Iterable[str]) -> list[Path]:
    """The files of `wanted` modules and of all they need, each behind what it needs."""
    known = {path.stem.replace("-", "_"): path for path in folder.rglob("*.ko")}
    (builtin_list,) = folder.glob("*/modules.builtin")
    builtin = {Path(line).stem.replace("-", "_") for line in builtin_list.read_text().splitlines()}
    order: dict[str, Path] = {}

    def add(name: str, *, needed: bool) -> None:
        if name in order or name in builtin:
            return
        if name not in known:
            if needed:
                raise FileNotFoundError(f"the kernel has no module {name}")
            return
        found = re.search(rb"\0depends=([^\0]*)\0", known[name].read_bytes())
        for other in found.group(1).decode().split(",") if found else ():
            if other:
                add(other.replace("-", "_"), needed=True)
        for other in ASKED_FOR_BY_NAME.get(name, ()):
            add(other, needed=False)
        order[name] = known[name]

    for name in wanted:
        add(name, needed=True)
    return list(order.values())


class Archive:
    """A cpio archive in the kernel's format ("newc")."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + path, data):
            self._parts.append(part + b"\0" * (-len(part) % 4))

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)

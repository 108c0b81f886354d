"""The files of a model folder: found only inside it, and read only up to a size.

Models come from strangers, and archives and repositories carry links: a template that is a link to a secret would show
the secret to every client, a FIFO would block the start for ever. So every reader of a folder goes through `find_file`.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from afd.errors import ModelError

MAX_JSON_BYTES = 64 << 20
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"  # a Hugging Face cache: files in a snapshot are links into the blobs beside


def find_file(folder: Path, name: str) -> Path | None:
    """The real path of a file of a model folder; None when there is none of that name.

    ModelError when it lies outside the folder (or, in a Hugging Face cache, outside its blobs), or is no regular file.
    """
    path, root = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ModelError(f"{path}: a link to a file that does not exist") from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or with a NUL
        raise ModelError(f"{folder}: cannot open {name[:100]!r}: {error}") from error
    roots = [root]
    if root.parent.name == _SNAPSHOTS:
        roots.append(root.parent.parent / _BLOBS)
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise ModelError(f"{path}: lies outside the model's folder, at {real}: copy the file into the folder")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: not a regular file")
    return real


def read_file(folder: Path, name: str, max_bytes: int) -> bytes | None:
    """The content of a file of a model folder; None when there is none. ModelError as of `find_file`, or too large."""
    path = find_file(folder, name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise ModelError(f"{folder / name}: larger than {max_bytes} bytes")
    return data


def read_text(folder: Path, name: str, max_bytes: int) -> str | None:
    """The text of a file, with every line ending as \\n; see `read_file`. ModelError when it is not UTF-8."""
    data = read_file(folder, name, max_bytes)
    try:
        return None if data is None else data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / name}: not UTF-8: {error}") from error


def read_json_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a model folder; None when there is no such file. ModelError when it is not one."""
    data = read_file(folder, name, MAX_JSON_BYTES)
    return None if data is None else json_object(folder / name, data)


def json_object(path: Path, data: bytes) -> dict[str, Any]:
    """path: for messages. ModelError unless `data` is one JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value

"""What a supervised child is told, and how: one framed JSON message on its standard input, never argv or environment.

The pipe stays open afterwards: its end of file tells the child that the supervisor is gone, and the coordinator hears
over it which members' processes have ended, as JSON lines. News flows the other way as JSON lines over an inherited
descriptor.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

import msgspec

from afd.config import ClusterConfig
from afd.errors import ConfigError
from afd.host.open_files import OWN_FILES

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2  # the user has to change something: restarting does not help
EXIT_LOST = 75  # the cluster let this process go (declared lost): a fresh one may join
MAX_FRAME_BYTES = 4 << 20
FILES_PER_WORKER = 16  # sockets, shared memory, doorbells and pipes, generously
MAX_NEWS_BYTES = 4096  # one write of at most PIPE_BUF is atomic
_LENGTH = struct.Struct("<I")


class RoleLaunch(msgspec.Struct, frozen=True):
    """Everything a role's process needs.

    secret: hex.
    announce_fd: where news goes; -1 = nobody listens.
    supervisor_pid: 0 = none.
    run_file: to remove when the supervisor is gone without having done it; "" = none.
    """

    role: str
    rank: int
    config: ClusterConfig
    secret: str
    announce_fd: int = -1
    supervisor_pid: int = 0
    run_file: str = ""

    @property
    def name(self) -> str:
        return f"{self.role}/{self.rank}" if self.rank >= 0 else self.role

    @property
    def orphaned(self) -> bool:
        """Whether the supervisor is gone; asked in the process that was launched."""
        return self.supervisor_pid != 0 and os.getppid() != self.supervisor_pid


def files_needed(role: str, config: ClusterConfig) -> int:
    """How many files a process may come to have open: a gateway for its clients, all others for the workers."""
    if role == "gateway":
        return OWN_FILES + config.gateway.max_connections
    return OWN_FILES + FILES_PER_WORKER * (config.topology.num_attention + config.num_ffn_workers)


_decoder = msgspec.json.Decoder(RoleLaunch)


def write_launch(fd: int, launch: RoleLaunch) -> None:
    """Send the frame; BrokenPipeError when the child is gone."""
    body = msgspec.json.encode(launch)
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def read_launch(fd: int) -> RoleLaunch | None:
    """Receive the frame; None when the supervisor went away first; ConfigError when it is not a frame."""
    head = _read_exactly(fd, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ConfigError("--supervised is for `afd up` only: standard input does not carry a launch frame")
    body = _read_exactly(fd, length)
    if body is None:
        return None
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"bad launch frame on standard input: {error}") from error


def _read_exactly(fd: int, length: int) -> bytes | None:
    """`length` bytes, or None at end of file."""
    data = b""
    while len(data) < length:
        piece = os.read(fd, length - len(data))
        if not piece:
            return None
        data += piece
    return data


def write_news(fd: int, news: dict[str, object]) -> None:
    """One line of news; a supervisor that is gone is not this function's business."""
    line = json.dumps(news, ensure_ascii=False, default=str).encode() + b"\n"
    if len(line) > MAX_NEWS_BYTES:
        raise ValueError(f"news of {len(line)} bytes: {sorted(news)}")
    try:
        os.write(fd, line)
    except BrokenPipeError:
        return


def parse_news(line: bytes) -> dict[str, Any]:
    """Inverse of one line; a broken line (a child killed while writing) is no news."""
    try:
        news = json.loads(line)
    except ValueError:
        return {}
    return news if isinstance(news, dict) else {}

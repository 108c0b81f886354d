"""A source seen as a model: AFD's parts mapped to stored names, and the check that header and spec agree."""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ModelError
from afd.model.families import Naming
from afd.model.inventory import TensorSpec, inventory
from afd.model.spec import ModelSpec
from afd.model.weights.source import RawTensor, Slices, TensorSource


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Reads a model's tensors by part; holds headers and metadata, no open file.  where: the file or folder."""

    spec: ModelSpec
    source: TensorSource
    naming: Naming
    where: str

    def verify(self) -> None:
        """Compare the whole header with the spec's inventory; every difference found is in one ModelError."""
        stored = self.source.tensors
        readable = self.source.readable_dtypes
        problems: list[str] = []
        expected: set[str] = set()
        for tensor in inventory(self.spec):
            name = self.naming.stored_name(tensor)
            expected.add(name)
            if name not in stored:
                problems.append(f"missing tensor {name}, expected shape {list(tensor.shape)}")
                continue
            found = stored[name]
            if found.shape != tensor.shape:
                problems.append(
                    f"{found.file}: tensor {name}: expected shape {list(tensor.shape)}, found {list(found.shape)}"
                )
            elif found.dtype not in readable:
                problems.append(
                    f"{found.file}: tensor {name}: dtype {found.dtype} is not supported "
                    f"(readable here: {', '.join(sorted(readable))})"
                )
        tied_head = self.naming.names["head"] if self.spec.tie_embeddings else None
        for name in stored:
            if name not in expected and name != tied_head and not self.naming.is_ignored(name):
                problems.append(
                    f"{stored[name].file}: extra tensor {name} of shape {list(stored[name].shape)}, "
                    f"which family {self.spec.family} does not have"
                )
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ModelError(f"{self.where}: {'; '.join(problems[:3])}{more}")

    def read(self, tensor: TensorSpec, slices: Slices = ()) -> RawTensor:
        return self.source.read(self.naming.stored_name(tensor), slices)

"""The compiled half of the hot path, or None: stepmesh works without it, more slowly.

What it holds is in `_native.pyi`. Nothing is decided there: every function has a twin in Python beside its use.
"""

from __future__ import annotations

try:
    from stepmesh import _native as native
except ImportError:  # not built: no compiler, or the source tree as it is
    native = None  # type: ignore[assignment]

__all__ = ["native"]

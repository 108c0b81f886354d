"""What the tests that need a real GPU ask first."""

from __future__ import annotations

import warnings

import pytest

from afd.errors import ConfigError
from afd.ops.select import check_device


def skip_without_gpu() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of drivers that do not fit
            check_device("cuda", "this test's device")
    except ConfigError as error:
        pytest.skip(f"no GPU: {error}")

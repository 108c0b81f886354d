"""What holds for every test."""

import contextlib
import gc

with contextlib.suppress(ImportError):  # the RDMA guest has no hypothesis, and runs no test that needs it
    from hypothesis import settings

    settings.register_profile("afd", deadline=None, derandomize=True)  # a busy machine is no failure
    settings.load_profile("afd")


def pytest_collection_finish() -> None:
    """The libraries and the collected tests are a million objects that stay: garbage collection need not visit them."""
    gc.collect()
    gc.freeze()

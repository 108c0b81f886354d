"""What holds for every test."""

import gc


def pytest_collection_finish() -> None:
    """The libraries and the collected tests are a million objects that stay: garbage collection need not visit them."""
    gc.collect()
    gc.freeze()

"""What holds for every test."""

import gc

try:
    from hypothesis import settings
except ImportError:  # the RDMA guest has neither it nor the large libraries, and its tests measure memory
    pass
else:
    settings.register_profile("afd", deadline=None, derandomize=True)  # a busy machine is no failure
    settings.load_profile("afd")

    def pytest_collection_finish() -> None:
        """The libraries and the collected tests are a million objects that stay: collections need not visit them."""
        gc.collect()
        gc.freeze()

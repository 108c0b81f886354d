"""Shared by the tests of relays."""

import pytest
import torch

from afd.relay import runs


@pytest.fixture
def patient_relays(monkeypatch):
    """One thread; and a machine that stalls does not end a relay."""
    torch.set_num_threads(1)
    monkeypatch.setattr(runs, "PATIENCE_S", 0.5)
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 0.5)
    monkeypatch.setattr(runs, "RELAY_S", 5.0)

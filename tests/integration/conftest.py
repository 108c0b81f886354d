"""Shared by the tests of relays."""

import pytest
import torch

from afd.model import relay as model_relay


@pytest.fixture
def patient_relays(monkeypatch):
    """One thread; and a machine that stalls does not end a relay."""
    torch.set_num_threads(1)
    monkeypatch.setattr(model_relay, "PATIENCE_S", 0.5)
    monkeypatch.setattr(model_relay, "STEP_PATIENCE_S", 0.5)
    monkeypatch.setattr(model_relay, "RELAY_S", 5.0)

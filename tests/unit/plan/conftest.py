"""The shipped catalogues, and an estimator with the shipped factors."""

import pytest

from afd.plan.catalog import load_chips, load_models
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimator
from afd.plan.stages import RooflineStages


@pytest.fixture(scope="session")
def chips():
    return load_chips()


@pytest.fixture(scope="session")
def models():
    return load_models()


@pytest.fixture(scope="session")
def estimator():
    efficiency = Efficiency()
    return Estimator(RooflineStages(efficiency), efficiency)

"""How many cases: few within the suite, FUZZ_CASES in all under `make fuzz`, which counts them at the end."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "fuzz",
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
TOTAL = int(os.environ.get("FUZZ_CASES", 0))
FEW = 3


@pytest.fixture(scope="session", autouse=True)
def profile():
    if TOTAL:
        settings.load_profile("fuzz")


@pytest.fixture
def cases():
    from fuzz.strategies import FUZZERS

    return -(-TOTAL // (2 * len(FUZZERS))) if TOTAL else FEW

"""What every test runs under: poisoned torch.empty, fixed seeds, and the backends that can serve here."""

import os
import sys

# before torch is loaded: OpenMP threads that wait do not spin, which on a busy machine takes ten times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import helpers
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pyrx",
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    # the fixtures here hold nothing that an example changes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("pyrx")


def pytest_collection_modifyitems(config, items):
    if "large" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(pytest.mark.skip(reason="large: run by make test-large"))


@pytest.fixture(autouse=True)
def poison():
    """torch.empty, from Python and from C++, gives NaN (integers: their maximum)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=helpers.CPU_BACKENDS)
def backend(request):
    """Every backend that serves CPU tensors; one that PYRX_REQUIRE names must be there."""
    return helpers.need(request.param)


@pytest.fixture
def cpu():
    """The C++ backend, for what only compiled ops have: schemas, saved tensors, memory."""
    return helpers.need("cpu")


@pytest.fixture
def python():
    """Runs a script in a fresh interpreter and returns its standard output."""

    def run(script, *arguments, **environment):
        import subprocess

        paths = [str(helpers.ROOT), str(helpers.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run

"""How many cases: few within the suite, FUZZ_CASES in all under `make fuzz`, which counts them at the end."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "fuzz",
    deadline=None,
    derandomize=False,  # the suite's profile, of which this one is made, would not heed --hypothesis-seed
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
TOTAL = int(os.environ.get("FUZZ_CASES", 0))
FEW = 3


@pytest.fixture(scope="session")
def cases():
    """Of each test."""
    from fuzz.strategies import FUZZERS

    return -(-TOTAL // (2 * len(FUZZERS))) if TOTAL else FEW


def pytest_terminal_summary(terminalreporter):
    """A line for each function, under `make fuzz` alone."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    counts = {}
    for report in reports:
        for key, value in report.user_properties:
            if key == "fuzz":
                name, *numbers = value
                counts[name] = [a + b for a, b in zip(counts.get(name, (0, 0)), numbers, strict=True)]
    if not TOTAL or not counts:
        return
    failed = len(terminalreporter.stats.get("failed", []))
    terminalreporter.section("fuzzing: calls served and refused")
    for name, (served, refused) in sorted(counts.items()):
        terminalreporter.write_line(f"{name:44} {served:7,} {refused:7,}")
    served, refused = (sum(each) for each in zip(*counts.values(), strict=True))
    seed = terminalreporter.config.getoption("--hypothesis-seed", None)
    terminalreporter.write_line(f"{served + refused:,} cases of {len(counts)} functions, seed {seed}, found: {failed}")

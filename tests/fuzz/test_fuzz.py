"""Every public function by random calls, good ones and bad ones; `make fuzz` runs many, the suite some."""

from __future__ import annotations

import importlib
import os
import pkgutil

import helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
import pyrx
from fuzz.calls import Call, agree
from fuzz.strategies import COVERED, FUZZERS, Draws, spoil

for module in pkgutil.iter_modules(fuzz.__path__):
    if not module.name.startswith("test_"):
        importlib.import_module(f"fuzz.{module.name}")

# compared with the reference; empty: the one that the call picks. FUZZ_BACKENDS=triton wants TRITON_INTERPRET=1
BACKENDS = tuple(each or None for each in os.environ.get("FUZZ_BACKENDS", "cpu,").split(","))


@st.composite
def calls(draw: st.DrawFn, name: str, spoiled: bool) -> Call:
    draws = Draws(draw)
    call = FUZZERS[name](draws)
    return spoil(draws, call) if spoiled else call


def fuzz_with(cases: int, name: str, spoiled: bool, record: pytest.FixtureRequest) -> None:
    done = {"served": 0, "refused": 0}

    @settings(max_examples=cases)
    @given(calls(name, spoiled))
    def check(call: Call) -> None:
        done["served" if agree(call, *BACKENDS) else "refused"] += 1

    try:
        check()
    finally:
        record.node.user_properties.append(("fuzz", (name, *done.values())))
    assert spoiled or done["served"] >= done["refused"], f"{name}: good calls were refused: {done}"


@pytest.mark.parametrize("name", FUZZERS)
def test_good_calls(name, cases, request):
    for backend in filter(None, BACKENDS):
        helpers.need(backend)
    fuzz_with(cases, name, False, request)


@pytest.mark.parametrize("name", FUZZERS)
def test_bad_calls(name, cases, request):
    for backend in filter(None, BACKENDS):
        helpers.need(backend)
    fuzz_with(cases, name, True, request)


def public_callables():
    """Names of what users call: of each module's __all__, and BlockMask's own methods."""
    found = {
        f"{prefix}{name}"
        for prefix, module in (("", pyrx), ("nn.", pyrx.nn), ("optim.", pyrx.optim), ("search.", pyrx.search))
        for name in module.__all__
        if callable(getattr(module, name))
    }
    operators = ("__and__", "__or__", "__invert__")
    methods = {
        name
        for name, value in vars(pyrx.BlockMask).items()
        if (name in operators or not name.startswith("_")) and callable(getattr(pyrx.BlockMask, name))
    }
    return found | {f"BlockMask.{name}" for name in methods}


def test_every_public_callable_has_a_fuzzer():
    assert public_callables() == COVERED

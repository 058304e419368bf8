"""Tables of bad calls, and what is wrong with a seed or a generator."""

import pytest
import torch


def row(argument, expected, got, error=ValueError, /, **changes):
    """One bad call: the arguments changed, and the error's argument, expected and got."""
    text = f"expected {argument} {expected}, got {got}"
    names = "+".join(changes)
    marks = [pytest.mark.cpu_kernels] * ("of class ids in" in expected)
    return pytest.param(changes, error, text, id=f"{names}: {text}"[:110], marks=marks)


SEED_ROWS = [
    row("seed", "to be an int", "float", TypeError, seed=0.5),
    row("seed", "to be an int", "bool", TypeError, seed=True),
    row("seed", f"in [{-(2**63)}, {2**64 - 1}]", 2**64, seed=2**64),
    row("seed", f"in [{-(2**63)}, {2**64 - 1}]", -(2**63) - 1, seed=-(2**63) - 1),
    row("seed", "of dtype torch.int64", "torch.int32", TypeError, seed=torch.tensor(1, dtype=torch.int32)),
    row("seed", "of one element", "[2]", seed=torch.tensor([1, 2])),
    row("seed", "on device cpu", "meta", RuntimeError, seed=torch.zeros((), dtype=torch.int64, device="meta")),
]
GENERATOR_ROWS = [
    row("at most one of seed", "and generator", "both", seed=1, generator=torch.Generator()),
    row("generator", "to be a torch.Generator", "int", TypeError, generator=3),
]


def check(function, arguments, op, error, text):
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert str(caught.value) == f"pyrx::{op}: {text}"

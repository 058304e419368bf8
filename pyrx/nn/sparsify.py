"""Installs N:M sparsity on a model's layers, removes it, and tells of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyrx._checks import FLOAT_DTYPES, check_bool, fail
from pyrx.nn.nm_sparsity import NMSparsity
from pyrx.ops.nm_sparsity import check_nm

# A glob of module names, a type of modules, or what tells of a layer's name and the layer whether it is meant.
Selector = str | type | Callable[[str, nn.Module], bool]
Selectors = Selector | Sequence[Selector] | None

# which dimension is cut into groups: inputs, or input channels of a convolution's group
DIMS: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}


class SparseLayer(NamedTuple):
    """A row of a report.

    `parameters` and `kept` count elements of the weight and how many of them the mask keeps; `density` is the share of
    them that is not 0 in what the layer works with now (NaN on the meta device); `state` is "sparse", "dense" or
    "frozen".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    n: int
    m: int
    dim: int
    parameters: int
    kept: int
    density: float
    estimator: str
    decay: float
    state: str


class SkippedLayer(NamedTuple):
    """A layer or weight that a report passed over, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class SparsityReport:
    """The layers that have N:M sparsity, and those that were passed over; prints as a table."""

    rows: list[SparseLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def density(self) -> float:
        """Of all rows' weights together; 1 where there is none."""
        return sum(row.density * row.parameters for row in self.rows) / self.parameters if self.parameters else 1.0

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "n:m", "dim", "parameters", "kept", "density", "estimator", "decay", "state")
        lines = [head, *map(_cells, self.rows)]
        lines.append(("total", "", "", "", "", f"{self.parameters:,}", f"{self.kept:,}", f"{self.density:.4f}"))
        text = _table(lines, numbers=(3, 4, 5, 6, 7, 9)) if self.rows else "no layer has N:M sparsity"
        if self.skipped:
            text += "\nskipped:\n" + _table([("  " + (name or "(model)"), *rest) for name, *rest in self.skipped])
        return text


def _cells(row: SparseLayer) -> tuple[str, ...]:
    return (
        row.name or "(model)",
        row.kind,
        "x".join(map(str, row.shape)),
        f"{row.n}:{row.m}",
        str(row.dim),
        f"{row.parameters:,}",
        f"{row.kept:,}",
        f"{row.density:.4f}",
        row.estimator,
        f"{row.decay:.4g}" if row.estimator.startswith("mdgf") else "-",
        row.state,
    )


def _table(lines: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Columns aligned: to the right where they hold numbers."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    aligned = [
        "  ".join(cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i]) for i, cell in enumerate(line))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


class Installed(NamedTuple):
    """An NMSparsity where it is in a model: of the tensor `tensor` of `layer`, whose name is `name`."""

    name: str
    layer: nn.Module
    tensor: str
    sparsity: NMSparsity

    def original(self) -> Tensor:
        return self.layer.parametrizations[self.tensor].original  # type: ignore[index, union-attr]


def installed(op: str, model: nn.Module, alone: bool = True) -> list[Installed]:
    """Every NMSparsity of a model, in its order; `alone`: those chained with another parametrization are an error."""
    if not isinstance(model, nn.Module):
        fail(op, "model", "to be a torch.nn.Module", type(model).__name__, TypeError)
    found = []
    for name, layer in model.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        for tensor, chain in layer.parametrizations.items():
            for each in chain:
                if isinstance(each, NMSparsity):
                    if alone and len(chain) > 1:
                        kinds = ", ".join(type(other).__name__ for other in chain)
                        fail(
                            op, f"layer {name!r}", f"with NMSparsity as the only parametrization of its {tensor}", kinds
                        )
                    found.append(Installed(name, layer, tensor, each))
    return found


def _kept(shape: Sequence[int], n: int, m: int, dim: int) -> int:
    length = shape[dim]
    if length == 0:
        return 0
    return math.prod(shape) // length * (length // m * n + min(n, length % m))


@torch.no_grad()
def _row(each: Installed) -> SparseLayer:
    sparsity, weight = each.sparsity, getattr(each.layer, each.tensor)
    there = not weight.is_meta and weight.numel() > 0
    return SparseLayer(
        each.name,
        parametrize.type_before_parametrizations(each.layer).__name__,
        tuple(weight.shape),
        sparsity.n,
        sparsity.m,
        sparsity.dim,
        weight.numel(),
        _kept(weight.shape, sparsity.n, sparsity.m, sparsity.dim),
        torch.count_nonzero(weight).item() / weight.numel() if there else math.nan,
        sparsity.estimator,
        sparsity.decay.item() if there else math.nan,
        "frozen" if sparsity.frozen else "sparse" if sparsity.enabled else "dense",
    )


def sparsity_report(model: nn.Module) -> SparsityReport:
    """The layers of `model` that have N:M sparsity now, with the density measured from their weights.

    Returns: `SparsityReport`: `rows` of `SparseLayer`, and `parameters`, `kept` and `density` of all of them; prints as
    a table. It reads every weight, and waits for a GPU.
    """
    return SparsityReport([_row(each) for each in installed("sparsity_report", model, alone=False)])


class _Layer(NamedTuple):
    """A layer whose weight could be sparse, and every name that it has."""

    names: tuple[str, ...]
    module: nn.Module
    dim: int


def _as_selectors(op: str, argument: str, given: Selectors) -> list[Selector]:
    if given is None:
        return []
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for selector in each:
        if not isinstance(selector, (str, type)) and not callable(selector):
            kinds = "of globs, module types and predicates"
            fail(op, argument, kinds, type(selector).__name__, TypeError)
    return each


def _matches(selector: Selector, layer: _Layer, modules: Mapping[str, nn.Module]) -> bool:
    """Globs and types also mean what is inside of the modules that they match."""
    for name in layer.names:
        if not isinstance(selector, (str, type)):
            if selector(name, layer.module):
                return True
            continue
        parts = name.split(".")
        for outer in {"", *(".".join(parts[:i]) for i in range(1, len(parts) + 1))}:
            if fnmatchcase(outer, selector) if isinstance(selector, str) else isinstance(modules[outer], selector):
                return True
    return False


def _candidates(model: nn.Module) -> list[_Layer]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    kinds = tuple(DIMS)
    return [
        _Layer(tuple(each), module, next(dim for kind, dim in DIMS.items() if isinstance(module, kind)))
        for module, each in names.items()
        if isinstance(module, kinds)
    ]


def _others(model: nn.Module) -> Iterator[SkippedLayer]:
    """Matrices of other modules."""
    for name, module in model.named_modules():
        if isinstance(module, (*DIMS, parametrize.ParametrizationList)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() >= 2:
                kind = parametrize.type_before_parametrizations(module).__name__
                yield SkippedLayer(f"{name}.{own}".lstrip("."), kind, "in neither a Linear nor a Conv layer")


def _reason(layer: _Layer, n: int, m: int, dim: int, pad: bool, holders: Mapping[int, list[str]]) -> str | None:
    """Why a layer's weight cannot or need not be N:M."""
    weight = layer.module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet: run it once first"
    others = [name for name in holders[id(weight)] if name != f"{layer.names[0]}.weight".lstrip(".")]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is of dtype {weight.dtype}"
    shape = list(weight.shape)
    if not -len(shape) <= dim < len(shape):
        fail("sparsify_", "dim", f"in [{-len(shape)}, {len(shape) - 1}] for layer {layer.names[0]!r}", dim)
    if layer.dim == 1 == dim and shape[1] == 1:
        groups = getattr(layer.module, "groups", 1)
        return "depthwise: one input channel a group" if groups > 1 else "it has one input channel"
    if not pad and shape[dim] % m != 0:
        return f"m = {m} does not divide dimension {dim} of its weight, {shape}"
    if n < m and _kept(shape, n, m, dim) == math.prod(shape):
        return f"no group of its weight, {shape}, has more than n = {n} elements"
    return None


def _layer_options(argument: str, given: object, default: Mapping[str, Any]) -> dict[str, Any] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {**default, **given}
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return {**default, "n": given[0], "m": given[1]}
    fail("sparsify_", argument, "to be (n, m), None or a dict of options", repr(given), TypeError)


def sparsify_(
    model: nn.Module,
    n: int,
    m: int,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    per_layer: Mapping[str, Any] | None = None,
    **options: Any,
) -> SparsityReport:
    """Makes the weights of a model's Linear and Conv layers N:M sparse, by `pyrx.nn.NMSparsity` on each, in place.

    Args:
        model: any module. Parameters stay the objects that they are (a layer's weight goes by the name of
            `parametrizations.weight.original`), so that an optimizer may be made before or after, but one of
            `pyrx.optim` with `model` after. (Its state dict goes by the order of parameters(), in which such a weight
            comes after its bias.)
        n: how many elements of each group are *kept*, 1 to m.
        m: the size of a group, 1 to 128: of a Linear layer's inputs, of a convolution's input channels in its group.
        include: only these layers: a glob of names ("encoder.*.linear?"), a type of modules, a predicate (name, layer)
            -> bool, or a sequence of them. Globs and types also mean all that is inside of the modules that they match.
            Default: all.
        exclude: not these, which wins. Default: none.
        per_layer: {glob: (n, m), None or a dict of n, m and options} for layers that differ; None leaves a layer dense,
            of several globs that match a layer the last one counts. Layers outside of `include` stay outside.
        options: of `pyrx.nn.NMSparsity`: dim (default -1 for Linear, 1 for Conv), estimator, decay, strength,
            magnitude, pad, backend.

    Returns:
        `SparsityReport`: `rows` of what was installed and `skipped` with a reason for each: an m that does not divide
        (without `pad`), depthwise convolutions, groups that would keep all, weights that are tied to another module's
        (in both it would be another weight), and matrices outside of Linear and Conv layers, as the in_proj of
        MultiheadAttention, whose out_proj is a Linear. A module that a model uses in several places is handled once.

    Raises:
        ValueError: n and m as nm_mask; a layer whose weight is parametrized already; a glob, type or predicate of
        include, or a glob of per_layer, that matches no Linear or Conv layer; a glob of exclude that matches no module.
        TypeError: unknown options, types. All of it before anything is changed; RuntimeError of a backend that cannot
        serve: then what was changed is undone.

    Equivalent to, for each layer, `register_parametrization(layer, "weight", pyrx.nn.NMSparsity(n, m, **options))`.

    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    >>> report = pyrx.nn.sparsify_(model, 2, 4, exclude=["2"])
    >>> [layer.name for layer in report.rows], [(layer.name, layer.reason) for layer in report.skipped]
    (['0'], [('2', 'excluded')])
    >>> float(model[0].weight.ne(0).float().mean())
    0.5
    """
    op = "sparsify_"
    check_nm(op, n, m)
    if per_layer is not None and not isinstance(per_layer, Mapping):
        fail(op, "per_layer", "to be a mapping of globs", type(per_layer).__name__, TypeError)
    present = installed(op, model, alone=False)  # checks the model, too
    default = {"n": n, "m": m, **options}
    NMSparsity(**default)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = _candidates(model)
    included, excluded = (_as_selectors(op, *each) for each in (("include", include), ("exclude", exclude)))
    special = {
        glob: _layer_options(f"per_layer[{glob!r}]", given, default) for glob, given in (per_layer or {}).items()
    }
    for argument, selectors in (("include", included), ("per_layer", list(special))):
        for selector in selectors:
            if not any(_matches(selector, layer, modules) for layer in layers):
                fail(op, argument, "to match Linear or Conv layers each", f"{selector!r}, which matches none")
    for selector in excluded:
        if isinstance(selector, str) and not any(fnmatchcase(name, selector) for name in modules):
            fail(op, "exclude", "to match modules each", f"{selector!r}, which matches none")

    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(f"{name}.{own}".lstrip("."))
    report = SparsityReport()
    chosen: list[tuple[nn.Module, NMSparsity]] = []
    for layer in layers:
        name, kind = layer.names[0], parametrize.type_before_parametrizations(layer.module).__name__
        wanted: dict[str, Any] | None = default
        for glob, given in special.items():
            wanted = given if _matches(glob, layer, modules) else wanted
        reason: str | None
        if any(_matches(selector, layer, modules) for selector in excluded):
            reason = "excluded"
        elif included and not any(_matches(selector, layer, modules) for selector in included):
            reason = "not included"
        elif wanted is None:
            reason = "None in per_layer"
        else:
            if parametrize.is_parametrized(layer.module, "weight"):
                kinds = ", ".join(type(each).__name__ for each in layer.module.parametrizations["weight"])  # type: ignore[index]
                fail(op, f"layer {name!r}", "without a parametrization of its weight", kinds)
            sparsity = NMSparsity(**{"dim": layer.dim, **wanted})
            reason = _reason(layer, sparsity.n, sparsity.m, sparsity.dim, sparsity.pad, holders)
            if reason is None:
                chosen.append((layer.module, sparsity))
        if reason is not None:
            report.skipped.append(SkippedLayer(name, kind, reason))
    report.skipped += _others(model)

    done: list[nn.Module] = []
    try:
        for module, sparsity in chosen:
            parametrize.register_parametrization(module, "weight", sparsity)
            done.append(module)
    except Exception:
        for module in done:
            _remove(module, "weight", leave_parametrized=False)
        raise
    before = {each.sparsity for each in present}
    new = [each for each in installed(op, model, alone=False) if each.sparsity not in before]
    report.rows += [_row(each) for each in new]
    return report


def _remove(layer: nn.Module, tensor: str, leave_parametrized: bool) -> None:
    # a copy of a parametrized layer shares its class, out of which the tensor's property is taken: so it gets its own
    of = type(layer)
    layer.__class__ = type(of.__name__, of.__bases__, dict(of.__dict__))
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized)
    if tensor == "weight" and isinstance(layer, tuple(DIMS)):
        # it comes back as the last parameter and was the first; optimizers' state dicts go by the order
        for name in [name for name in layer._parameters if name != tensor]:
            layer._parameters[name] = layer._parameters.pop(name)


def desparsify_(model: nn.Module, leave_parametrized: bool = True) -> nn.Module:
    """Takes N:M sparsity out of a model, in place: its layers have plain weights again, under their old names.

    Args:
        model: any module; one without N:M sparsity is left as it is.
        leave_parametrized: the weights become what the layers worked with, sparse (default), else what was trained.

    Returns: the model. The parameters are the objects that they were, so that an optimizer goes on with them.

    Raises: ValueError where NMSparsity is chained with another parametrization, before anything is changed.
    """
    check_bool("desparsify_", leave_parametrized=leave_parametrized)
    for each in installed("desparsify_", model):
        _remove(each.layer, each.tensor, leave_parametrized)
    return model

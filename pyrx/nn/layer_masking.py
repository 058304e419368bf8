"""Input masking of convolutional networks inside their layers: every activation carries the mask of its places."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyrx._backends import constant_in_compile
from pyrx._checks import accumulation_dtype, check_choice, check_device, check_float, check_shape, check_tensor, fail
from pyrx.ops.neighbor_fill import neighbor_fill

NAME = "LayerMasking"


class Masked(NamedTuple):
    """An activation and its places: x (N, C, H, W) is 0 where mask (N, 1, H, W) is False."""

    x: Tensor
    mask: Tensor


class _Reference(NamedTuple):
    """The result of an earlier step, in a step's arguments."""

    name: str


class _Step(NamedTuple):
    """One node of the traced model. `rule` is None where masked arguments have none; `done` are last used here."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    rule: Callable[..., Any] | None
    done: tuple[str, ...]


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    # a select, not a product: NaN times 0 is NaN
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# Rules take `call`, which runs the node on a tensor, and its one masked argument.


def _same_places(call: Callable[[Tensor], Tensor], value: Masked) -> Masked:
    """Elementwise with f(0) = 0."""
    return Masked(call(value.x), value.mask)


def _elementwise(call: Callable[[Tensor], Tensor], value: Masked) -> Masked:
    return Masked(_keep(call(value.x), value.mask), value.mask)


def _pool(call: Callable[[Tensor], Tensor], value: Masked) -> Masked:
    """A pooled place is there if any place of its window is."""
    return Masked(call(value.x), call(value.mask.float()) > 0)


def _mean(call: Callable[[Tensor], Tensor], value: Masked) -> Tensor:
    """The head's mean over the places that are there."""
    mean = call(value.x)
    share = value.mask.to(accumulation_dtype(mean.dtype)).mean((1, 2, 3)) + 1e-8
    return (mean / share.reshape(-1, *[1] * (mean.dim() - 1))).to(mean.dtype)


def _adaptive_pool(call: Callable[[Tensor], Tensor], value: Masked) -> Masked | Tensor:
    pooled = call(value.x)
    if pooled.shape[2:] == (1, 1):
        return _mean(lambda _: pooled, value)
    return Masked(pooled, call(value.mask.float()) > 0)


def _plain(call: Callable[[Any], Any], value: Masked) -> Any:
    return call(value.x)


def _spatial_mean(call: Callable[[Tensor], Tensor], value: Masked) -> Tensor | None:
    # by its shape: only a mean over height and width, or one that keeps them as ones, has (N, C) and ones
    mean = call(value.x)
    n, c = value.x.shape[:2]
    return _mean(lambda _: mean, value) if tuple(mean.shape) in ((n, c), (n, c, 1, 1)) else None


def _rows(call: Callable[[Tensor], Tensor], value: Masked) -> Tensor | None:
    """view and reshape to (N, features), as flatten."""
    rows = call(value.x)
    return rows if rows.dim() == 2 and rows.shape[0] == value.x.shape[0] else None


# Rules of several arguments take them all.


def _join(function: Callable[..., Tensor], a: Any, b: Any) -> Masked:
    """A residual: what is missing on one side is missing in the result."""
    masks = [each.mask for each in (a, b) if isinstance(each, Masked)]
    x = function(*[each.x if isinstance(each, Masked) else each for each in (a, b)])
    if len(masks) == 2 and masks[0] is masks[1]:
        return Masked(x, masks[0])
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    return Masked(_keep(x, mask), mask)


def _add(a: Any, b: Any) -> Masked:
    return _join(torch.add, a, b)


def _mul(a: Any, b: Any) -> Masked:
    return _join(torch.mul, a, b)


def _cat(tensors: Any, dim: int = 0) -> Masked | None:
    """Channels of several maps: a place is there if it is in more than half of them."""
    if dim not in (1, -3) or not all(isinstance(each, Masked) for each in tensors):
        return None
    votes = torch.stack([each.mask for each in tensors]).sum(0)
    mask = votes * 2 > len(tensors)
    return Masked(_keep(torch.cat([each.x for each in tensors], 1), mask), mask)


def _reach(conv: nn.Conv2d) -> list[int]:
    """How far a window's last place is from its first, in height and width."""
    return [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]


def _padding(conv: nn.Conv2d) -> list[int]:
    """(left, right, top, bottom), as F.pad takes it."""
    if conv.padding == "same":
        (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in _reach(conv)]
    else:
        (top, left) = (bottom, right) = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return [left, right, top, bottom]


def _conv(conv: nn.Conv2d, value: Masked, fill: str | None, backend: str | None) -> Masked:
    x, mask = value
    # the paper's code fills k rings for a k x k kernel; no window that holds a present place sees the last of them
    rings = max(_reach(conv))
    if fill == "neighbors" and rings > 0:
        x = neighbor_fill(x, mask, rings, backend=backend)[0]
    y = conv(x)

    def pad(places: Tensor) -> Tensor:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(places, _padding(conv), mode)

    present = pad(mask.to(accumulation_dtype(y.dtype)))
    after = F.max_pool2d(present, conv.kernel_size, conv.stride, 0, conv.dilation) > 0
    if fill == "renormalize":
        ones = present.new_ones(1, 1, *conv.kernel_size)
        # padding is no missing place: the mean is over the window's places in the image
        inside = pad(torch.ones_like(mask[:1], dtype=present.dtype))
        seen, held = (F.conv2d(each, ones, None, conv.stride, 0, conv.dilation) for each in (present, inside))
        share = seen.to(present.dtype) / held.to(present.dtype).clamp(min=1) + 1e-8
        factor = (1 / torch.where(after, share, 1.0)).to(y.dtype)
        y = y * factor
        if conv.bias is not None:
            y = y + conv.bias.to(y.dtype)[:, None, None] * (1 - factor)
    return Masked(_keep(y, after), after)


SAME_PLACES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
)  # fmt: skip
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    **dict.fromkeys(SAME_PLACES, _same_places),
    **dict.fromkeys(
        (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus), _elementwise
    ),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d), _pool),
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _plain,
    nn.Conv2d: _conv,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish), _same_places
    ),
    **dict.fromkeys((torch.tanh, F.dropout, F.dropout2d), _same_places),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, F.hardsigmoid, F.softplus), _elementwise),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d, F.avg_pool2d), _pool),
    F.adaptive_avg_pool2d: _adaptive_pool,
    **dict.fromkeys((torch.flatten, getattr), _plain),
    torch.mean: _spatial_mean,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _mul),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
}
METHODS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("relu", "relu_", "tanh", "contiguous", "clone"), _same_places),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _elementwise),
    **dict.fromkeys(("flatten", "size", "dim"), _plain),
    **dict.fromkeys(("view", "reshape"), _rows),
    "mean": _spatial_mean,
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("mul", "mul_"), _mul),
}
OF_ALL_ARGUMENTS = (_add, _mul, _cat)


def _module_rule(module: nn.Module) -> Callable[..., Any] | None:
    for kind in type(module).__mro__:
        if kind in MODULES:
            # a subclass of a convolution or pool may pad as it likes, one of a batch norm has an activation at most
            same = type(module).forward is kind.forward
            return MODULES[kind] if same or MODULES[kind] is _elementwise else None
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _module_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _steps(model: nn.Module) -> list[_Step]:
    graph = _Tracer().trace(model)
    steps: list[_Step] = []
    last_user = {node: user for user in graph.nodes for node in user.all_input_nodes}
    for node in graph.nodes:
        rule: Callable[..., Any] | None = None
        if node.op == "call_module":
            rule = _module_rule(model.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            rule = (FUNCTIONS if node.op == "call_function" else METHODS).get(node.target)
        args, kwargs = (fx.map_arg(each, lambda n: _Reference(n.name)) for each in (node.args, node.kwargs))
        done = tuple(each.name for each in node.all_input_nodes if last_user[each] is node)
        steps.append(_Step(node.name, node.op, node.target, args, kwargs, rule, done))
    return steps


def _resolved(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, _Reference):
        return values[value.name]
    if isinstance(value, (tuple, list)):
        return type(value)([_resolved(each, values) for each in value])
    if isinstance(value, dict):
        return {key: _resolved(each, values) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*[_resolved(each, values) for each in (value.start, value.stop, value.step)])
    return value


def _bare(value: Any) -> Any:
    """Activations without their masks."""
    if isinstance(value, Masked):
        return value.x
    if isinstance(value, (tuple, list)):
        return type(value)([_bare(each) for each in value])
    if isinstance(value, dict):
        return {key: _bare(each) for key, each in value.items()}
    return value


def _any_masked(value: Any) -> bool:
    if isinstance(value, Masked):
        return True
    if isinstance(value, dict):
        return any(_any_masked(each) for each in value.values())
    return isinstance(value, (tuple, list)) and any(_any_masked(each) for each in value)


class LayerMasking(nn.Module):
    """A convolutional network that is shown a part of its input: masked places are hidden from every layer.

    Replacing pixels by a colour shows a network another image. Layer masking gives each layer the activations of the
    places that are there: before a convolution missing places are filled from their neighbours, behind each layer they
    are taken out again, and the head averages over what is left.

    Args:
        model: any module that torch.fx traces and whose spatial layers are among Conv2d, BatchNorm2d, elementwise
            activations, Dropout, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, residual sums and products, concatenations
            of channels, means over height and width, and flatten; torchvision's and timm's ResNets and DenseNets are.
            It is used as it is: parameters are shared, train and eval mode are its own.
        fill: "neighbors" (default) fills what a convolution's kernel can reach; None leaves 0; "renormalize" divides
            each convolution (without its bias) by the share of its window that is there.
        backend: of `pyrx.neighbor_fill`.

    Shapes: `forward(images, mask)` with images (N, C, H, W) and mask (N, 1, H, W), bool or of images' dtype, True (not
    0) where an image is shown; the result is the model's. Values of masked pixels are never used, NaN included.

    Rules, m the mask: Conv2d y * m' with m' = max_pool(m) of the convolution's window; batch norm and activations
    f(x) * m; max pooling pools both; average pooling likewise, m' = (avg > 0); residual (a + b) * (m_a & m_b);
    concatenation m where more than half of the maps have it; head mean(x) / (mean(m) + 1e-8). Layers behind the head
    are the model's own. With an all-True mask the result is the model's (float64: to 1e-8).

    Cost: the model's, one `pyrx.neighbor_fill` a convolution larger than 1x1, and a select a layer.

    Raises:
        ValueError: an unknown fill, shapes, a node of the model that has no rule for masked activations (its name is
        told). TypeError: dtypes. What torch.fx raises where it cannot trace.

    Source: Balasubramanian and Feizi, "Towards improved input masking for convolutional neural networks", ICCV 2023.
    """

    model: nn.Module
    fill: str | None
    backend: str | None

    def __init__(self, model: nn.Module, fill: str | None = "neighbors", *, backend: str | None = None) -> None:
        super().__init__()
        check_choice(NAME, "fill", fill, ("neighbors", None, "renormalize"))
        self.model, self.fill, self.backend = model, fill, backend
        self._traces: dict[tuple[bool, ...], list[_Step]] = {}
        self._trace(self._modes())

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.model.modules())

    @constant_in_compile
    def _trace(self, modes: tuple[bool, ...]) -> None:
        """Finds the steps in these modes, if they are new: in a trace `training` is a constant."""
        if modes not in self._traces:
            self._traces[modes] = _steps(self.model)

    def forward(self, images: Tensor, mask: Tensor) -> Any:
        check_float(NAME, "images", images)
        if images.dim() != 4:
            fail(NAME, "images", "of shape [N, C, H, W]", list(images.shape))
        check_tensor(NAME, "mask", mask)
        if mask.dtype not in (torch.bool, images.dtype):
            fail(NAME, "mask", f"of dtype torch.bool or {images.dtype}", mask.dtype, TypeError)
        check_shape(NAME, "mask", mask, "[N, 1, H, W]", [images.shape[0], 1, *images.shape[2:]])
        check_device(NAME, "mask", mask, images.device)
        present = mask if mask.dtype == torch.bool else mask != 0
        values: dict[str, Any] = {}
        modes = self._modes()
        self._trace(modes)
        for step in self._traces[modes]:
            if step.op == "placeholder":
                # a model's other arguments have defaults
                first = not values
                values[step.name] = Masked(_keep(images, present), present) if first else step.args[0]
                continue
            args, kwargs = _resolved(step.args, values), _resolved(step.kwargs, values)
            if step.op == "output":
                return _bare(args[0])
            values[step.name] = self._run(step, args, kwargs)
            for name in step.done:
                del values[name]
        raise AssertionError("a traced graph ends in its output")

    def _run(self, step: _Step, args: Any, kwargs: Any) -> Any:
        if step.op == "get_attr":
            return operator.attrgetter(step.target)(self.model)
        if not _any_masked((args, kwargs)):
            return self._call(step, args, kwargs)
        found = None
        if step.rule in OF_ALL_ARGUMENTS:
            try:
                found = step.rule(*args, **kwargs)
            except TypeError:  # arguments that the rule does not take
                self._fail(step)
        elif step.rule is not None and args and isinstance(args[0], Masked) and not _any_masked((args[1:], kwargs)):
            if step.rule is _conv:
                conv: Any = self.model.get_submodule(step.target)
                return _conv(conv, args[0], self.fill, self.backend)
            found = step.rule(lambda x: self._call(step, (x, *args[1:]), kwargs), args[0])
        if found is None:
            self._fail(step)
        return found

    def _fail(self, step: _Step) -> NoReturn:
        what = "to be of a kind that has a rule for masked activations"
        fail(NAME, f"node {step.name!r}", what, self._kind(step))

    def _call(self, step: _Step, args: Any, kwargs: Any) -> Any:
        if step.op == "call_module":
            return self.model.get_submodule(step.target)(*args, **kwargs)
        if step.op == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        return step.target(*args, **kwargs)

    def _kind(self, step: _Step) -> str:
        if step.op == "call_module":
            return f"the module {step.target}, a {type(self.model.get_submodule(step.target)).__name__}"
        return f"the {step.op.removeprefix('call_')} {getattr(step.target, '__name__', step.target)}"

    def extra_repr(self) -> str:
        return f"fill={self.fill!r}, backend={self.backend!r}"

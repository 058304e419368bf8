"""AdamW and SGD whose step keeps to N:M masks and makes them anew in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from pyrx._checks import check_choice, check_integer, check_number, check_own_memory, fail
from pyrx.ops.masked_update import RULES, check_weight, masked_adamw, masked_sgd
from pyrx.ops.nm_sparsity import check_nm, nm_mask, packed_shape
from pyrx.optim.shards import as_shard, check_shard, is_shard, local, own_bits

# of the groups in state dicts of torch.optim.AdamW and SGD
_TORCH_OPTIONS = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")

_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")


class _Masking(NamedTuple):
    """What a step does with the mask of one weight."""

    n: int
    m: int
    dim: int
    magnitude: bool
    pad: bool  # whether the last group may have fewer elements; of a step, whether it does
    rule: str
    refresh: bool


def _parametrizations(model: nn.Module) -> dict[Tensor, Any]:
    """{original weight: its N:M parametrization}, of those that take a mask."""
    found: dict[Tensor, Any] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for each in cast(dict[str, Any], module.parametrizations).values():
            if callable(getattr(each[0], "use_mask", None)) and isinstance(getattr(each, "original", None), Tensor):
                found[each.original] = each[0]
    return found


class MaskedOptimizer(Optimizer):
    """What MaskedAdamW and MaskedSGD have in common: which weights have masks, whose they are, when they are made."""

    name: str

    _constructed = True  # of a copy

    def __init__(self, params: ParamsT, defaults: dict[str, Any], model: nn.Module | None, backend: str | None) -> None:
        self.name = type(self).__name__
        self.backend = backend
        self._parametrizations = {} if model is None else _parametrizations(model)
        self._constructed = False
        super().__init__(params, {**defaults, "updates": 0})
        self._constructed = True
        given = (param for group in self.param_groups for param in group["params"])
        ranked = model is not None or any(group["n"] is not None for group in self.param_groups)
        if not ranked and any(group["rule"] == "sr-ste" for group in self.param_groups):
            fail(self.name, "rule", "with n and m, or a model, that give weights masks", "'sr-ste' without them")
        if model is not None and not self._parametrizations:
            fail(self.name, "model", "with pyrx.nn.NMSparsity on its layers (pyrx.nn.sparsify_)", "one without")
        if self._parametrizations and not any(param in self._parametrizations for param in given):
            fail(self.name, "params", "with a weight of model's under N:M sparsity", "none of them")
        for group in self.param_groups:
            self._offer(group)

    def __getstate__(self) -> dict[str, Any]:
        names = ("name", "backend", "_parametrizations")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of load_state_dict too, whose groups may be those of a torch optimizer, without masks."""
        before = self.__dict__.get("param_groups", state["param_groups"])
        super().__setstate__(state)
        for group, old in zip(self.param_groups, before, strict=True):
            for name in _TORCH_OPTIONS:
                group.pop(name, None)
            for name, value in old.items():
                group.setdefault(name, value)
            for param in group["params"]:
                self._restore(group, param)
            self._offer(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(group.get("amsgrad", False) for group in state_dict["param_groups"]):
            fail(self.name, "state_dict", "of an optimizer without amsgrad", "one with it")
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if self._constructed:  # else once all groups are checked
            self._offer(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice(self.name, "rule", group["rule"], RULES)
        check_number(self.name, "strength", group["strength"])
        check_integer(self.name, "refresh_every", group["refresh_every"], 1, 2**31)
        if (group["n"] is None) != (group["m"] is None):
            fail(self.name, "n and m", "together", f"{group['n']} and {group['m']}")
        if group["n"] is not None:
            check_nm(self.name, group["n"], group["m"])
            check_integer(self.name, "dim", group["dim"], -(2**31), 2**31)
        for i, param in enumerate(group["params"]):
            masking = self._masking(group, param)
            if masking is None:
                continue
            if hasattr(param, "_fsdp_flattened"):
                expected = "of fully_shard or whole, or without a mask"
                fail(self.name, f"params[{i}]", expected, "a part of FullyShardedDataParallel's", RuntimeError)
            check_weight(self.name, f"params[{i}]", param, masking.n, masking.m, masking.dim, masking.pad)
            if is_shard(param):
                check_shard(self.name, f"params[{i}]", param, masking.m, masking.dim)
            check_own_memory(self.name, f"params[{i}]", local(param.detach()))
            estimator = getattr(self._parametrizations.get(param), "estimator", None)
            if group["rule"] == estimator == "sr-ste":
                fail(self.name, "rule", 'other than "sr-ste" for weights whose estimator adds its term', "both")

    def _masking(self, group: dict[str, Any], param: Tensor) -> _Masking | None:
        """None for a weight without a mask."""
        of = self._parametrizations.get(param)
        if of is None:
            return group["n"] and _Masking(group["n"], group["m"], group["dim"], True, False, group["rule"], True)
        ranks = (of.n, of.m, of.dim, of.magnitude, getattr(of, "pad", False))
        if not getattr(of, "enabled", True):
            return _Masking(*ranks, "dense", False)
        return _Masking(*ranks, group["rule"], not getattr(of, "frozen", False))

    def _offer(self, group: dict[str, Any]) -> None:
        """Masks for the parametrizations, which the first step takes into the state: empty until then, as of torch."""
        for param in group["params"]:
            masking = self._masking(group, param)
            if masking is not None and param in self._parametrizations and not self.state.get(param):
                self._parametrizations[param].use_mask(self._ranked(param, masking))

    def _used_mask(self, param: Tensor) -> Tensor | None:
        """The forward's: a module that was moved or loaded a state may have another than the optimizer by now."""
        mask = self.state.get(param, {}).get("mask")
        return getattr(self._parametrizations.get(param), "mask", mask)

    def _share(self, param: Tensor, masking: _Masking, mask: Tensor | None) -> None:
        """Makes `mask`, or a new one where that is not the weight's, the state's and the parametrization's.

        Of a shard the state has the own part of the mask, a view of the parametrization's, whose forward is of all.
        """
        of = self._parametrizations.get(param)
        if is_shard(param):
            mask = mask.full_tensor() if of is not None and is_shard(mask) else mask  # type: ignore[union-attr]
            mask = mask if of is not None or is_shard(mask) else None
        if mask is None or mask.device != param.device or list(mask.shape) != packed_shape(param.shape):
            mask = self._ranked(param, masking)
        mask = mask.contiguous()  # else each step copies it
        if of is not None:
            of.use_mask(mask)
        self.state[param]["mask"] = as_shard(own_bits(mask, param), param) if is_shard(param) and of else mask

    def _ranked(self, param: Tensor, masking: _Masking) -> Tensor:
        """A mask: of a shard the whole one for a parametrization, else a shard."""
        weight = param.detach()
        if is_shard(param) and param in self._parametrizations:
            weight = weight.full_tensor()  # type: ignore[attr-defined]
        ranked = self._ranked_alone(local(weight), masking)
        return as_shard(ranked, param) if is_shard(weight) else ranked

    def _ranked_alone(self, weight: Tensor, masking: _Masking) -> Tensor:
        n, m, dim, magnitude, pad = masking[:5]
        options: dict[str, Any] = {"dim": dim, "magnitude": magnitude, "pad": pad, "backend": self.backend}
        return nm_mask(weight, n, m, packed=True, **options)

    def _is_shared(self, param: Tensor, used: Tensor | None) -> bool:
        """Whether the state has the mask that the forward uses."""
        mask = self.state[param].get("mask")
        if used is None or mask is None or used.device != param.device:
            return False
        return used is mask or (
            is_shard(mask) and local(mask).untyped_storage().data_ptr() == local(used).untyped_storage().data_ptr()
        )

    def _restore(self, group: dict[str, Any], param: Tensor) -> None:
        """The state of one parameter after its tensors were replaced."""
        state, masking = self.state.get(param, {}), self._masking(group, param)
        if "mask" in state:  # which load_state_dict made the parameter's dtype: it holds 0 to 255
            state["mask"] = state["mask"].to(torch.uint8)
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
        if masking is None:
            state.pop("mask", None)
        elif state:
            self._share(param, masking, state.get("mask"))

    @torch.no_grad()
    def refresh_masks(self) -> None:
        """Makes every mask anew, in place, as after weights were loaded or changed between two steps."""
        for group in self.param_groups:
            for param in group["params"]:
                masking = self._masking(group, param)
                mask = self._used_mask(param)
                if masking is not None and masking.refresh and mask is not None:
                    mask.copy_(self._ranked(param, masking))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss anew and returns it, and so does the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [self._batches(group) for group in self.param_groups]  # all checks, before anything moves
        for group, of_group in zip(self.param_groups, batches, strict=True):
            group["updates"] += 1
            for (masking, *_), batch in of_group.items():
                if masking is None:
                    self._update_densely(group, batch)
                elif masking.pad:  # the fused step ranks whole groups alone
                    self._update(group, batch, masking._replace(n=1, m=1, refresh=False))
                    for param in batch if masking.refresh else ():
                        local(self.state[param]["mask"]).copy_(self._ranked_alone(local(param), masking))
                else:
                    self._update(group, batch, masking)
                for param in batch if masking is not None and masking.refresh else ():
                    if is_shard(param) and param in self._parametrizations:
                        self._parametrizations[param].mask.copy_(self.state[param]["mask"].full_tensor())
        return loss

    def _batches(self, group: dict[str, Any]) -> dict[tuple[Any, ...], list[Tensor]]:
        """The parameters that have gradients, as they are updated together."""
        due = (group["updates"] + 1) % group["refresh_every"] == 0
        batches: dict[tuple[Any, ...], list[Tensor]] = {}
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{self.name} does not support sparse gradients")
            masking = self._masking(group, param)
            if masking is not None:
                n, m, dim, _, pad = masking[:5]
                check_weight(self.name, f"params[{i}]", param, n, m, dim, pad)
                masking = masking._replace(refresh=masking.refresh and due, pad=pad and param.shape[dim] % m != 0)
                used = self._used_mask(param)
                if not self._is_shared(param, used):
                    self._share(param, masking, used)
            batches.setdefault((masking, param.device, param.dtype), []).append(param)
        return batches

    def _list(self, params: list[Tensor], name: str) -> list[Tensor]:
        return [local(self.state[param][name]) for param in params]

    def _update(self, group: dict[str, Any], params: list[Tensor], masking: _Masking) -> None:
        raise NotImplementedError

    def _update_densely(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _options(self, group: dict[str, Any], masking: _Masking) -> dict[str, Any]:
        masked = masking._asdict()
        del masked["pad"]
        return {
            **masked,
            "strength": group["strength"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "backend": self.backend,
        }


def _operands(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients, of shards this rank's part."""
    return [local(param) for param in params], [local(param.grad) for param in params]


def _is_fused(params: list[Tensor], *devices: str) -> bool:
    """Whether torch's fused step takes them, which are of one device and dtype."""
    return params[0].is_floating_point() and params[0].device.type in devices


def _dense_rate(group: dict[str, Any], params: list[Tensor]) -> Any:
    """The learning rate as torch's own steps read it: of a tensor on a GPU, float32."""
    rate = group["lr"]
    return rate.float() if isinstance(rate, Tensor) and params[0].device.type == "cuda" else rate


def _check_common(lr: float | Tensor, weight_decay: float) -> None:
    """With the texts of torch.optim."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    elif not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


class MaskedAdamW(MaskedOptimizer):
    """AdamW of weights under N:M masks: update, decay and the new mask in one pass over weight, gradient and moments.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as of `torch.optim.AdamW`. lr may be a tensor of one element,
            which a CUDA graph reads anew in each replay.
        n, m, dim: of the masks, as of `pyrx.nm_mask`, which all of the group have: put biases into another. Default
            None: weights have no mask and `torch.optim.AdamW`'s own fused step, unless `model` gives them one.
        rule: what becomes of weights that are not kept: "hold" (they and their moments stay, against decay and
            momentum), "sr-ste" (strength * W is added to their gradient; the estimator of the forward is "ste" then) or
            "dense" (they move as the others). Default "hold", which ignores the gradient that an estimator gives what
            is not kept: with "mdgf", or to have "ste" revive weights, take "dense".
        strength: of "sr-ste". Default 2e-4.
        refresh_every: masks are made anew at every so many steps. Default 1.
        model: weights of it that are the original of a `pyrx.nn.NMSparsity` take n, m, dim, magnitude and pad from it,
            at every step, and it takes the mask, which the step rewrites in place: so the forward ranks nothing. While
            it is not enabled its weight moves densely; while it is frozen its mask stays.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Groups may have lr, betas, eps, weight_decay, n, m, dim, rule, strength, refresh_every and maximize of their own.
    The state of a weight is step, exp_avg, exp_avg_sq and mask (bits as `pyrx.nm_mask(packed=True)` makes), the step a
    tensor on its device. State dicts resume to the same bits. That of a `torch.optim.AdamW` can be loaded
    too: the masks are made of the weights then.

    Shards of `fully_shard` step by themselves where each has whole groups: cut along another dimension than `dim`, as
    by default, or in multiples of m. With `model` the ranks then gather the new masks, a bit an element, for the
    forward; make the optimizer after `fully_shard`, on every rank.

    A mask is made when a weight first steps (with `model`: at once), of the weight as it is: call `refresh_masks()`
    after weights were loaded later. `refresh_every` counts on the host, so a captured step always does what it did when
    it was captured.

    Equivalent to `torch.optim.AdamW` for kept weights, each rounded once; see `pyrx.optim.masked_adamw`.

    Cost: 28.25 bytes an element in float32, 14.25 in bfloat16, and one launch for weights of one dtype and mask.

    Raises:
        ValueError: n > m, an m that does not divide, an unknown rule, "sr-ste" where nothing has a mask; a model
        without N:M sparsity, or of which no such weight is given; the options of torch.optim.AdamW with its texts; a
        state dict with amsgrad. TypeError: masked weights that are not floating-point. RuntimeError: sparse gradients,
        masked weights in shards that cut groups, or FullyShardedDataParallel's, a backend that cannot serve.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; Zhou et al., "Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        n: int | None = None,
        m: int | None = None,
        dim: int = -1,
        rule: str = "hold",
        strength: float = 2e-4,
        refresh_every: int = 1,
        maximize: bool = False,
        model: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        _check_common(lr, weight_decay)
        if not 0.0 <= eps:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"n": n, "m": m, "dim": dim}
        defaults |= {"rule": rule, "strength": strength, "refresh_every": refresh_every, "maximize": maximize}
        super().__init__(params, defaults, model, backend)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return self._list(params, "exp_avg"), self._list(params, "exp_avg_sq"), self._list(params, "step")

    def _update(self, group: dict[str, Any], params: list[Tensor], masking: _Masking) -> None:
        exp_avgs, exp_avg_sqs, steps = self._moments(params)
        beta1, beta2 = group["betas"]
        # of Python's 1 a CPU tensor is made for each
        torch._foreach_add_(steps, _ONE if steps[0].is_cpu else 1.0)
        masked_adamw(
            *_operands(params),
            exp_avgs,
            exp_avg_sqs,
            self._list(params, "mask"),
            steps,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **self._options(group, masking),
        )

    def _update_densely(self, group: dict[str, Any], params: list[Tensor]) -> None:
        exp_avgs, exp_avg_sqs, steps = self._moments(params)
        beta1, beta2 = group["betas"]
        adamw(
            *_operands(params),
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=_is_fused(params, "cpu", "cuda"),
            capturable=params[0].device.type == "cuda",
            has_complex=params[0].is_complex(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=_dense_rate(group, params),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class MaskedSGD(MaskedOptimizer):
    """SGD of weights under N:M masks: update, decay and the new mask in one pass over weight, gradient and momentum.

    params, lr, momentum, dampening, weight_decay, nesterov and maximize are those of `torch.optim.SGD`; all else, and
    what is raised, is as of `MaskedAdamW`. Weight decay is part of the gradient here, so under the rule "hold" it does
    not reach weights that are not kept. The state of a weight is momentum_buffer and mask.

    Equivalent to `torch.optim.SGD` for kept weights, each rounded once; see `pyrx.optim.masked_sgd`.

    Cost: 20.25 bytes an element in float32 with momentum, 12.25 without.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        n: int | None = None,
        m: int | None = None,
        dim: int = -1,
        rule: str = "hold",
        strength: float = 2e-4,
        refresh_every: int = 1,
        maximize: bool = False,
        model: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        _check_common(lr, weight_decay)
        if not 0.0 <= momentum:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "n": n, "m": m, "dim": dim}
        defaults |= {"rule": rule, "strength": strength, "refresh_every": refresh_every, "maximize": maximize}
        super().__init__(params, defaults, model, backend)

    def _with_buffers(
        self, group: dict[str, Any], params: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor], float]]:
        """(parameters, their momentum buffers or none, dampening): a buffer's first step is the gradient itself."""
        if group["momentum"] == 0:
            yield params, [], 0.0
            return
        first: list[Tensor] = []
        later: list[Tensor] = []
        for param in params:
            state = self.state[param]
            is_first = state.get("momentum_buffer") is None
            if is_first:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            (first if is_first and group["dampening"] != 0 else later).append(param)
        for batch, dampening in ((first, 0.0), (later, group["dampening"])):
            if batch:
                yield batch, self._list(batch, "momentum_buffer"), dampening

    def _update(self, group: dict[str, Any], params: list[Tensor], masking: _Masking) -> None:
        for batch, buffers, dampening in self._with_buffers(group, params):
            masked_sgd(
                *_operands(batch),
                buffers,
                self._list(batch, "mask"),
                momentum=group["momentum"],
                dampening=dampening,
                nesterov=group["nesterov"],
                **self._options(group, masking),
            )

    def _update_densely(self, group: dict[str, Any], params: list[Tensor]) -> None:
        # on a GPU torch's other steps ask a tensor lr for its number, which waits
        fused = _is_fused(params, "cuda") or None
        for batch, buffers, dampening in self._with_buffers(group, params):
            sgd(
                *_operands(batch),
                buffers or [None] * len(batch),  # type: ignore[arg-type]
                fused=fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=_dense_rate(group, batch),
                dampening=dampening,
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )

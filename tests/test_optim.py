"""The masked optimizers as optimizers: options, groups, state dicts, schedulers, and who holds the masks."""

import copy
import io
import math

import pytest
import torch
from helpers import assert_same_bits, need
from torch import nn
from torch.nn.utils import parametrize

import pyrx
from pyrx.optim import MaskedAdamW, MaskedSGD, masked, masked_adamw
from pyrx.reference.dropout import unpack_bits

PAIRS = [
    (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.01}),
]
OPTIMIZERS = [(ours, options) for ours, _, options in PAIRS]
X = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))


class Sparse(nn.Module):
    """A parametrization that an optimizer hands a mask: what pyrx.optim asks of one."""

    def __init__(self, n=2, m=4, dim=-1, magnitude=True):
        super().__init__()
        self.n, self.m, self.dim, self.magnitude = n, m, dim, magnitude
        self.enabled, self.frozen, self.mask = True, False, None

    def use_mask(self, mask):
        self.mask = mask

    def forward(self, weight):
        if not self.enabled:
            return weight
        options = {"dim": self.dim, "magnitude": self.magnitude, "backend": "reference"}
        return pyrx.nm_sparsify(weight, self.n, self.m, mask=self.mask, **options)


def network(sparse=(), seed=0):
    """Two layers; those of `sparse` parametrized."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    for i, each in dict(sparse).items():
        parametrize.register_parametrization(net[i], "weight", each)
    return net


def train(net, optimizer, steps, first=0):
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss = (net(X) - X[:, :8].roll(i, 0)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def assert_same_parameters(a, b):
    for (name, own), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_same_bits(own, other, name)


def kept(optimizer, weight):
    return unpack_bits(optimizer.state[weight]["mask"], weight.shape[-1])


def groups_of(net, **masked):
    """The first layer's weight masked, the rest dense."""
    first, *rest = net.parameters()
    return [{"params": [first], "n": 2, "m": 4, **masked}, {"params": rest}]


# Dense and masked weights.


@pytest.mark.parametrize("ours, peer, options", PAIRS)
def test_without_masks_it_is_torchs(ours, peer, options):
    nets = network(), network()
    fused = {"fused": True} if peer is torch.optim.AdamW else {}
    train(nets[0], ours(nets[0].parameters(), **options), 5)
    train(nets[1], peer(nets[1].parameters(), **options, **fused), 5)
    assert_same_parameters(*nets)


@pytest.mark.parametrize("options", [{"dampening": 0.3}, {"nesterov": True}, {"momentum": 0.0}], ids=str)
def test_dense_weights_by_torchs_fused_sgd(monkeypatch, options):
    """As on a GPU; a gradient that comes late has its first step of momentum then."""
    monkeypatch.setattr(masked, "_is_fused", lambda params, *devices: True)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}
    ours, theirs = ([nn.Parameter(torch.ones(3, i + 2)) for i in range(3)] for _ in range(2))
    optimizers = pyrx.optim.MaskedSGD(ours, **options), torch.optim.SGD(theirs, **options)
    for step in range(3):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            for each in pair:
                each.grad = torch.full_like(each, 0.5 * step - i) if step >= i else None
        for each in optimizers:
            each.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ours, peer, options", PAIRS)
@pytest.mark.parametrize("maximize", [False, True])
def test_kept_weights_are_as_torchs(backend, ours, peer, options, maximize):
    """Of one layer, whose gradients do not depend on the weights."""
    need(backend, ops=("masked_update",))
    weight = nn.Parameter(torch.randn(8, 16))
    other = nn.Parameter(weight.detach().clone())
    optimizer = ours([weight], n=2, m=4, refresh_every=10**6, maximize=maximize, backend=backend, **options)
    against = peer([other], maximize=maximize, **options)
    for i in range(5):
        weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(i))
        other.grad = weight.grad.clone()
        before = weight.detach().clone()
        optimizer.step()
        against.step()
        mask = kept(optimizer, weight)
        assert mask.sum() == 64 and torch.equal(weight[~mask], before[~mask])
        torch.testing.assert_close(weight[mask], other[mask], rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight[mask], before[mask])


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["hold", "sr-ste", "dense"])
def test_backends_agree(cpu, ours, options, rule):
    need(cpu, ops=("masked_update",))
    nets = network(), network()
    for net, backend in zip(nets, ("reference", cpu), strict=True):
        train(net, ours(groups_of(net, rule=rule), strength=0.1, backend=backend, **options), 6)
    assert_same_parameters(*nets)


def test_every_group_has_its_own(backend):
    need(backend, ops=("masked_update",))
    net = network()
    first, bias, second, last = net.parameters()
    groups = [
        {"params": [first], "n": 1, "m": 4, "dim": 0, "rule": "sr-ste", "strength": 0.3, "lr": 0.1},
        {"params": [second], "n": 2, "m": 8, "refresh_every": 2},
        {"params": [bias, last]},
    ]
    optimizer = MaskedAdamW(groups, lr=0.01, backend=backend)
    train(net, optimizer, 2)
    masks = kept(optimizer, first), kept(optimizer, second)
    assert torch.equal(masks[0], pyrx.nm_mask(first, 1, 4, dim=0, backend="reference"))
    assert torch.equal(masks[1], pyrx.nm_mask(second, 2, 8, backend="reference"))
    assert "mask" not in optimizer.state[bias]
    before = first.detach().clone(), first.grad, optimizer.state[first]["mask"].clone()
    grad = torch.randn(24, 16)
    first.grad, second.grad, bias.grad, last.grad = grad, None, None, None
    state = {k: v.clone() for k, v in optimizer.state[first].items()}
    optimizer.step()
    state["step"] += 1
    masked_adamw(
        [before[0]], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [state["mask"]], [state["step"]],
        1, 4, dim=0, rule="sr-ste", strength=0.3, lr=0.1, weight_decay=0.01, backend="reference",
    )  # fmt: skip
    assert_same_bits(first, before[0])
    assert optimizer.state[second]["step"] == 2 and optimizer.state[first]["step"] == 3


@pytest.mark.parametrize("every", [1, 2, 3])
def test_refresh_every(every):
    weight = nn.Parameter(torch.randn(32, 16))
    optimizer = MaskedSGD([weight], lr=1.0, n=2, m=4, rule="dense", refresh_every=every)
    last = pyrx.nm_mask(weight, 2, 4)
    for step in range(1, 8):
        weight.grad = torch.randn(32, 16)
        optimizer.step()
        now = pyrx.nm_mask(weight, 2, 4)
        assert not torch.equal(now, last)
        last = now if step % every == 0 else last
        assert torch.equal(kept(optimizer, weight), last)


def test_refresh_masks():
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = MaskedAdamW([weight], n=2, m=4)
    weight.grad = torch.randn(8, 16)
    optimizer.step()
    mask = optimizer.state[weight]["mask"]
    weight.data.copy_(torch.randn(8, 16))
    optimizer.refresh_masks()
    assert optimizer.state[weight]["mask"] is mask
    assert torch.equal(kept(optimizer, weight), pyrx.nm_mask(weight, 2, 4))


# What any optimizer does.


def test_closure_and_missing_gradients():
    net = network()
    optimizer = MaskedAdamW(groups_of(net), lr=0.01)
    first, *rest = net.parameters()
    before = [each.detach().clone() for each in net.parameters()]

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        first.grad = None
        return loss

    assert optimizer.step(closure).requires_grad
    assert torch.equal(first, before[0]) and "step" not in optimizer.state[first]
    assert not any(torch.equal(a, b) for a, b in zip(rest, before[1:], strict=True))
    optimizer.zero_grad()
    assert all(each.grad is None for each in net.parameters())
    assert optimizer.step() is None


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
def test_schedulers_and_a_tensor_learning_rate(ours, options):
    nets, optimizers = (network(), network()), []
    for net, lr in zip(nets, (options["lr"], torch.tensor(options["lr"], dtype=torch.float64)), strict=True):
        optimizer = ours([next(net.parameters())], n=2, m=4, **(options | {"lr": lr}))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for i in range(3):
            train(net, optimizer, 1, i)
            scheduler.step()
        optimizers.append(optimizer)
    assert isinstance(optimizers[1].param_groups[0]["lr"], torch.Tensor)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(options["lr"] / 8)
    assert_same_parameters(*nets)


def test_grad_scaler():
    """A step with infinite gradients is left out, others are unscaled."""
    nets = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [MaskedAdamW(groups_of(net), lr=0.01) for net in nets]
    for i in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss = (net(X) * (math.inf if i == 1 else 1.0)).square().mean()
            if net is nets[0]:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            elif i != 1:
                loss.backward()
                optimizer.step()
    assert_same_parameters(*nets)
    assert optimizers[0].state[nets[0][0].weight]["step"] == 3


# State dicts.


def saved(state_dict):
    """Through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resume_is_bit_exact(ours, options, dtype):
    net = network().to(dtype)
    other = network(seed=5).to(dtype)

    def steps(net, optimizer, first, last):
        for i in range(first, last):
            for j, each in enumerate(net.parameters()):
                each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(10 * i + j)).to(dtype)
            optimizer.step()

    optimizer = ours(groups_of(net, refresh_every=3, rule="sr-ste"), **options)
    steps(net, optimizer, 0, 4)
    resumed = ours(groups_of(other), **(options | {"lr": 3.0}))
    other.load_state_dict(saved(net.state_dict()))
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert resumed.state[other[0].weight]["mask"].dtype == torch.uint8
    for each in (optimizer, resumed):
        steps(net if each is optimizer else other, each, 4, 9)
    assert_same_parameters(net, other)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[a].items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(resumed.state[b][name], value, name)
    assert resumed.param_groups[0]["refresh_every"] == 3 and resumed.param_groups[0]["lr"] == options["lr"]


def test_a_copy_goes_on_by_itself():
    net = network({0: Sparse()})
    optimizer = MaskedAdamW(net.parameters(), lr=0.01, model=net)
    train(net, optimizer, 2)
    other, resumed = copy.deepcopy((net, optimizer))
    train(net, optimizer, 3, 2)
    train(other, resumed, 3, 2)
    assert_same_parameters(net, other)
    sparse = other[0].parametrizations.weight
    assert sparse[0].mask is resumed.state[sparse.original]["mask"]


@pytest.mark.parametrize("capturable", [False, True])
def test_loads_a_torch_adamw(capturable):
    net = network()
    peer = torch.optim.AdamW([{"params": [each]} for each in net.parameters()], lr=0.02, capturable=capturable)
    if capturable:
        peer = torch.optim.AdamW([{"params": [each]} for each in net.parameters()], lr=0.02, fused=True)
    train(net, peer, 3)
    first, *rest = net.parameters()
    optimizer = MaskedAdamW([{"params": [first], "n": 2, "m": 4}, *({"params": [each]} for each in rest)])
    optimizer.load_state_dict(saved(peer.state_dict()))
    group, state = optimizer.param_groups[0], optimizer.state[first]
    assert (group["lr"], group["n"], group["rule"]) == (0.02, 2, "hold") and "fused" not in group
    assert torch.equal(kept(optimizer, first), pyrx.nm_mask(first, 2, 4))
    assert_same_bits(state["exp_avg"], peer.state[first]["exp_avg"])
    assert state["step"] == 3 and state["step"].dtype == torch.float32 and "mask" not in optimizer.state[rest[0]]
    train(net, optimizer, 1)
    old = peer.state_dict()  # as earlier versions of torch wrote it
    old["state"] = {key: each | {"step": 3} for key, each in old["state"].items()}
    optimizer.load_state_dict(old)
    step = optimizer.state[first]["step"]
    assert step == 3 and step.dtype == torch.float32 and step.device == first.device
    amsgrad = torch.optim.AdamW(net.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="expected state_dict of an optimizer without amsgrad, got one with it"):
        MaskedAdamW(net.parameters()).load_state_dict(amsgrad.state_dict())


# A model's parametrizations.


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
def test_a_model_s_masks(ours, options):
    """The forward uses the mask that the step rewrites, which is what it would have ranked."""
    nets = network({0: Sparse(), 2: Sparse(1, 4, dim=0)}), network({0: Sparse(), 2: Sparse(1, 4, dim=0)})
    optimizer = ours(nets[0].parameters(), model=nets[0], rule="dense", **options)
    first, second = (nets[0][i].parametrizations.weight for i in (0, 2))
    for each in (first, second):
        assert each[0].mask is not None and not optimizer.state, "empty until the first step, as torch's"
    plain = ours(nets[1].parameters(), n=None, rule="dense", **options)
    for i in range(4):
        train(nets[0], optimizer, 1, i)
        train(nets[1], plain, 1, i)
        for each in (first, second):
            of = each[0]
            assert of.mask is optimizer.state[each.original]["mask"]
            expected = pyrx.nm_mask(each.original, of.n, of.m, dim=of.dim, packed=True, backend="reference")
            assert torch.equal(of.mask, expected)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_signed_ranks_and_other_counts():
    net = network({0: Sparse(magnitude=False)})
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, model=net, rule="dense")
    sparse = net[0].parametrizations.weight
    train(net, optimizer, 1)
    assert torch.equal(kept(optimizer, sparse.original), pyrx.nm_mask(sparse.original, 2, 4, magnitude=False))
    sparse[0].n, sparse[0].m = 1, 8  # as a schedule does
    train(net, optimizer, 1)
    assert torch.equal(kept(optimizer, sparse.original), pyrx.nm_mask(sparse.original, 1, 8, magnitude=False))
    sparse[0].m = 5
    before = sparse.original.detach().clone(), optimizer.state[sparse.original]["step"].clone()
    with pytest.raises(ValueError, match="that m = 5 divides"):
        train(net, optimizer, 1)
    assert torch.equal(sparse.original, before[0]) and optimizer.state[sparse.original]["step"] == before[1]


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
def test_padded_groups(ours, options):
    """The last group of a weight has fewer elements: masks are those of the weights after each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 8))
    pyrx.nn.sparsify_(net, 2, 4, pad=True)
    optimizer = ours(net.parameters(), model=net, **options)
    weight = net[2].parametrizations.weight.original
    mask = net[2].parametrizations.weight[0].mask
    for _ in range(3):
        before, held = weight.detach().clone(), ~unpack_bits(mask, 10)
        train(net, optimizer, 1)
        assert_same_bits(weight.detach()[held], before[held])
        assert not torch.equal(weight.detach(), before)
        assert_same_bits(mask, pyrx.nm_mask(weight, 2, 4, packed=True, pad=True))
    assert net[2].parametrizations.weight[0].mask is mask


def test_dense_and_frozen_parametrizations():
    net = network({0: Sparse()})
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, weight_decay=0.5, model=net)
    sparse = net[0].parametrizations.weight
    weight, of = sparse.original, sparse[0]
    mask = of.mask.clone()
    of.enabled = False
    before = weight.detach().clone()
    train(net, optimizer, 3)
    assert (weight != before).all() and torch.equal(of.mask, mask)  # dense: every weight moves
    of.enabled = True
    optimizer.refresh_masks()
    assert not torch.equal(of.mask, mask) and of.mask is optimizer.state[weight]["mask"]
    of.frozen = True
    mask = of.mask.clone()
    before = weight.detach().clone()
    train(net, optimizer, 3)
    held = ~kept(optimizer, weight)
    assert torch.equal(of.mask, mask) and torch.equal(weight[held], before[held])
    assert (weight != before)[~held].all()
    weight.data.neg_().add_(torch.randn(24, 16))
    optimizer.refresh_masks()
    assert torch.equal(of.mask, mask)


def test_loading_hands_the_masks_over_again():
    net, other = network({0: Sparse()}), network({0: Sparse()}, seed=3)
    optimizer = MaskedAdamW(net.parameters(), lr=0.01, model=net)
    train(net, optimizer, 3)
    resumed = MaskedAdamW(other.parameters(), lr=0.01, model=other)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    sparse = other[0].parametrizations.weight
    assert sparse[0].mask is resumed.state[sparse.original]["mask"]
    assert torch.equal(sparse[0].mask, net[0].parametrizations.weight[0].mask)
    train(net, optimizer, 2, 3)
    train(other, resumed, 2, 3)
    assert_same_parameters(net, other)
    # of a torch optimizer: masks of the weights
    peer = torch.optim.AdamW(net.parameters())
    train(net, peer, 2)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(peer.state_dict())
    assert torch.equal(sparse[0].mask, pyrx.nm_mask(sparse.original, 2, 4, packed=True))
    assert sparse[0].mask is resumed.state[sparse.original]["mask"]


def test_a_weight_on_another_device_gets_another_mask():
    net = network({0: Sparse()})
    optimizer = MaskedAdamW(net.parameters(), model=net)
    sparse = net[0].parametrizations.weight
    train(net, optimizer, 1)
    optimizer.state[sparse.original]["mask"] = optimizer.state[sparse.original]["mask"].to("meta")
    train(net, optimizer, 1)
    assert sparse[0].mask is optimizer.state[sparse.original]["mask"] and sparse[0].mask.device.type == "cpu"


def unshared(net):
    net.to(memory_format=torch.channels_last)


def moved(net):
    net[0].parametrizations.weight[0]._apply(torch.clone)


def without_a_mask(net):
    net.load_state_dict(convolution(2)[0].state_dict())


def convolution(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    pyrx.nn.sparsify_(net, 2, 4)
    return net, net[0].parametrizations.weight


@pytest.mark.parametrize("change", [unshared, moved, without_a_mask])
@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_module_that_changes_its_mask_shares_it_again(change, refresh, stepped):
    net, sparse = convolution(0)
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, model=net)
    for _ in range(stepped):
        sparse.original.grad = torch.randn_like(sparse.original)
        optimizer.step()
    before = sparse[0].mask
    change(net)
    assert sparse[0].mask is not before
    if refresh:
        sparse.original.data.neg_().add_(1)
        optimizer.refresh_masks()
    used = pyrx.nm_mask(sparse.original, 2, 4, dim=1)
    assert torch.equal(net[0].weight != 0, used)
    held = sparse.original.detach().clone()
    sparse.original.grad = torch.randn_like(held)
    optimizer.step()
    assert torch.equal(sparse.original == held, ~used)
    assert sparse[0].mask is optimizer.state[sparse.original]["mask"] and sparse[0].mask.is_contiguous()
    assert torch.equal(sparse[0].mask, pyrx.nm_mask(sparse.original, 2, 4, dim=1, packed=True))


def test_a_copy_before_any_step_has_its_masks_too():
    net, sparse = convolution(0)
    copied, _ = copy.deepcopy((net, MaskedAdamW(net.parameters(), model=net)))
    assert copied[0].parametrizations.weight[0].shared and sparse[0].shared


def test_a_fresh_optimizer_takes_a_distributed_checkpoint():
    """Which first makes the fresh one's state, by a step, where there is none."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def made(seed):
        net = network(seed=seed)
        pyrx.nn.sparsify_(net, 2, 4)
        return net, MaskedAdamW(net.parameters(), lr=0.05, refresh_every=2, model=net)

    net, optimizer = made(0)
    train(net, optimizer, 3)
    saved_net, saved_optimizer = copy.deepcopy(get_state_dict(net, optimizer))
    other, resumed = made(1)
    _, template = get_state_dict(other, resumed)
    assert template["state"].keys() == saved_optimizer["state"].keys()
    set_state_dict(other, resumed, model_state_dict=saved_net, optim_state_dict=saved_optimizer)
    for each in (net, optimizer), (other, resumed):
        train(*each, 4, 3)
    assert_same_parameters(net, other)


# Bad input.


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"n": 5, "m": 4}, ValueError, r"expected n in \[1, 4\], got 5"),
        ({"n": 2}, ValueError, "expected n and m together, got 2 and None"),
        ({"m": 4}, ValueError, "expected n and m together, got None and 4"),
        (
            {"n": 2, "m": 5},
            ValueError,
            r"expected params\[0\] of a size along dimension 1 that m = 5 divides, got \[8, 16\]",
        ),
        ({"n": 2, "m": 4, "dim": 2}, ValueError, r"expected dim in \[-2, 1\], got 2"),
        ({"n": 2.0, "m": 4}, TypeError, "expected n to be an int, got float"),
        ({"rule": "soft"}, ValueError, "expected rule to be one of 'hold', 'sr-ste', 'dense', got 'soft'"),
        ({"strength": "1"}, TypeError, "expected strength to be a float, got str"),
        ({"refresh_every": 0}, ValueError, r"expected refresh_every in \[1, 2147483648\], got 0"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("ours", [MaskedAdamW, MaskedSGD])
def test_bad_options(ours, options, error, text):
    weight = nn.Parameter(torch.randn(8, 16))
    with pytest.raises(error, match=text) as caught:
        ours([weight], **options)
    assert str(caught.value).startswith((f"pyrx::{ours.__name__}: ", "Invalid", "Tensor lr"))
    optimizer = ours([nn.Parameter(torch.randn(3))])
    if set(options) - {"lr", "weight_decay"}:
        with pytest.raises(error, match=text):
            optimizer.add_param_group({"params": [weight], **options})
        assert len(optimizer.param_groups) == 1


def test_shards_hold_whole_groups():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        rows, columns = (nn.Parameter(distribute_tensor(torch.randn(8, 12), mesh, [Shard(dim)])) for dim in (0, 1))
        with pytest.raises(RuntimeError, match=r"expected params\[0\] in shards of whole groups of m = 4, got 6 of 12"):
            MaskedAdamW([columns], n=2, m=4)
        MaskedAdamW([columns])
        MaskedAdamW([rows], n=2, m=4)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_options_of_each():
    weight = nn.Parameter(torch.randn(8, 16))
    for ours, options, text in [
        (MaskedAdamW, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        (MaskedAdamW, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        (MaskedAdamW, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
        (MaskedSGD, {"momentum": -1.0}, "Invalid momentum value: -1.0"),
        (MaskedSGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (MaskedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
    ]:
        with pytest.raises(ValueError, match=text):
            ours([weight], **options)


def test_bad_weights_and_gradients():
    integers = torch.ones(8, 16, dtype=torch.int64)
    with pytest.raises(
        TypeError, match=r"expected params\[0\] of dtype float16, bfloat16, float32 or float64, got torch.int64"
    ):
        MaskedAdamW([integers], n=2, m=4)
    expanded = torch.ones(1, 16).expand(8, 16)
    with pytest.raises(ValueError, match=r"expected params\[0\] to be memory of its own for every element"):
        MaskedAdamW([expanded], n=2, m=4)
    weight, other = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16))
    for options in ({"n": 2, "m": 4}, {}):
        for ours in (MaskedAdamW, MaskedSGD):
            optimizer = ours([weight, other], **options)
            before = weight.detach().clone()
            weight.grad, other.grad = torch.randn(8, 16), torch.randn(8, 16).to_sparse()
            with pytest.raises(RuntimeError, match=f"{ours.__name__} does not support sparse gradients"):
                optimizer.step()
            assert torch.equal(weight, before)
    net = network({0: Sparse()})
    net[0].parametrizations.weight[0].estimator = "sr-ste"
    with pytest.raises(ValueError, match='expected rule other than "sr-ste" for weights whose estimator adds its term'):
        MaskedAdamW(net.parameters(), model=net, rule="sr-ste")
    net = network({0: Sparse()})
    sparse = net[0].parametrizations.weight.original
    with pytest.raises(ValueError, match="expected rule to be one of"):
        MaskedAdamW([{"params": [sparse]}, {"params": [net[0].bias], "rule": "no"}], model=net)
    assert net[0].parametrizations.weight[0].mask is None, "an optimizer that is not made hands nothing over"
    with pytest.raises(RuntimeError, match="backend"):
        optimizer = MaskedAdamW([weight], n=2, m=4, backend="cuda")
        weight.grad = torch.randn(8, 16)
        optimizer.step()


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
def test_a_rule_without_masks(ours, options):
    text = "expected rule with n and m, or a model, that give weights masks, got 'sr-ste' without them"
    with pytest.raises(ValueError, match=f"pyrx::{ours.__name__}: {text}"):
        ours(network().parameters(), n=None, rule="sr-ste", **options)
    ours([{"params": network().parameters(), "n": 2, "m": 4}], rule="sr-ste", **options)


@pytest.mark.parametrize("ours, options", OPTIMIZERS)
def test_weights_of_another_model(ours, options):
    model = network({0: Sparse()})
    text = f"pyrx::{ours.__name__}: expected params with a weight of model's under N:M sparsity, got none of them"
    for params in (network().parameters(), copy.deepcopy(model).parameters(), [model[0].bias]):
        with pytest.raises(ValueError, match=text):
            ours(params, model=model, **options)
    assert model[0].parametrizations.weight[0].mask is None
    with pytest.raises(ValueError, match=r"expected model with pyrx.nn.NMSparsity on its layers .*, got one without"):
        ours(network().parameters(), model=network(), **options)
    ours([model[0].parametrizations.weight.original], model=model, **options)

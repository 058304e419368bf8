"""pyrx.nn.NMSparsity: its weights and gradients, its state, compiled, and in several processes."""

import copy
import io
import sys

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_same_bits
from test_training import averaged, with_process_group
from torch import nn
from torch.nn.utils import parametrize

import pyrx
from pyrx.nn import NMSparsity, sparsify_
from pyrx.nn.nm_sparsity import STATE
from pyrx.ops.nm_sparsity import ESTIMATORS

W = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def layer(n=2, m=4, **options):
    """A Linear layer of W with its NMSparsity."""
    made = nn.Linear(16, 6)
    with torch.no_grad():
        made.weight.copy_(W)
    parametrize.register_parametrization(made, "weight", NMSparsity(n, m, **options))
    return made, made.parametrizations.weight[0]


def state(sparsity):
    return {name: getattr(sparsity, name) for name in STATE}


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# NMSparsity.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_weight_and_its_gradient_are_the_functions(estimator):
    options = {"estimator": estimator, "decay": 0.25, "strength": 0.125, "magnitude": False}
    module, _ = layer(1, 4, **options)
    other = W.clone().requires_grad_()
    expected = pyrx.nm_sparsify(other, 1, 4, **options)
    assert_same_bits(module.weight, expected)
    upstream = torch.randn(6, 16)
    module.weight.backward(upstream)
    assert_same_bits(module.parametrizations.weight.original.grad, torch.autograd.grad(expected, other, upstream)[0])


def test_options_reach_the_function():
    w = torch.randn(5, 8, 3)
    for options in (
        {"dim": 1},
        {"dim": 0, "pad": True},
        {"dim": 1, "magnitude": False},
        {"dim": 1, "backend": "reference"},
    ):
        assert_same_bits(NMSparsity(2, 4, **options)(w), pyrx.nm_sparsify(w, 2, 4, **options))
    with pytest.raises(RuntimeError, match="backend"):
        NMSparsity(2, 4, dim=1, backend="cuda")(w)


def test_disabled_is_the_weight_itself():
    module, sparsity = layer()
    sparsity.enabled = False
    assert module.weight is module.parametrizations.weight.original
    sparsity.enabled = True
    assert (module.weight == 0).sum() == 48


def test_assignment_writes_the_original():
    module, _ = layer()
    value = torch.randn(6, 16)
    module.weight = value
    assert_same_bits(module.parametrizations.weight.original, value)
    assert_same_bits(module.weight, pyrx.nm_sparsify(value, 2, 4))


def test_frozen_masks_stay():
    module, sparsity = layer()
    original = module.parametrizations.weight.original
    before = pyrx.nm_mask(W, 2, 4)
    sparsity.freeze(original)
    assert sparsity.frozen and sparsity.mask.dtype == torch.uint8 and sparsity.mask.shape == (6, 2)
    with torch.no_grad():
        original.copy_(torch.randn(6, 16))
    assert_same_bits(module.weight, torch.where(before, original, 0.0))
    assert not torch.equal(pyrx.nm_mask(original, 2, 4), before)
    sparsity.unfreeze()
    assert sparsity.mask is None and not sparsity.frozen
    assert_same_bits(module.weight, pyrx.nm_sparsify(original, 2, 4))


@pytest.mark.parametrize("options", [{"magnitude": False}, {"dim": 0, "pad": True}, {"dim": 0, "magnitude": False}])
def test_frozen_masks_are_those_that_forward_ranks(options):
    w = torch.randn(10 if "pad" in options else 8, 16)
    sparsity = NMSparsity(2, 4, **options)
    ranked = sparsity(w)
    sparsity.freeze(w)
    assert_same_bits(sparsity(w), ranked)
    assert torch.equal(sparsity.mask, pyrx.nm_mask(w, 2, 4, packed=True, **options))


def test_masks_handed_over_are_shared():
    module, sparsity = layer()
    bits = pyrx.nm_mask(torch.randn(6, 16), 2, 4, packed=True)
    sparsity.use_mask(bits)
    assert sparsity.mask is bits
    assert_same_bits(module.weight, pyrx.nm_sparsify(W, 2, 4, mask=bits))
    bits.fill_(255)  # as its owner refreshes it
    assert_same_bits(module.weight, W)
    sparsity.freeze(module.parametrizations.weight.original)
    assert sparsity.mask is bits and torch.equal(bits, pyrx.nm_mask(W, 2, 4, packed=True))
    other = torch.zeros_like(bits)
    sparsity.use_mask(other)  # of another owner: what is frozen stays
    assert sparsity.mask is other and torch.equal(other, bits)
    sparsity.unfreeze()
    assert sparsity.mask is other
    sparsity.n = 1
    sparsity.refresh(module.parametrizations.weight.original)
    assert torch.equal(other, pyrx.nm_mask(W, 1, 4, packed=True))
    sparsity.use_mask(None)
    assert sparsity.mask is None and not sparsity.shared
    sparsity.refresh(W)
    assert sparsity.mask is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.float(),
    ],
)
def test_decay_stays_float64(change):
    module, sparsity = layer(estimator="mdgf", decay=0.1)
    sparsity.freeze(module.parametrizations.weight.original)
    mask = sparsity.mask.clone()
    change(module)
    assert sparsity.decay.dtype == torch.float64 and sparsity.decay.item() == 0.1
    assert torch.equal(sparsity.mask, mask) and sparsity.mask.dtype == torch.uint8
    original = module.parametrizations.weight.original
    assert_same_bits(module.weight, pyrx.nm_sparsify(original, 2, 4, estimator="mdgf", decay=0.1, mask=mask))
    assert module.to("meta").weight.is_meta and sparsity.decay.is_meta and sparsity.mask.is_meta


def changed(sparsity, weight, mask):
    """One of every attribute that is not its default."""
    sparsity.n, sparsity.m, sparsity.enabled = 1, 8, mask != "frozen"
    sparsity.decay.fill_(0.3)
    if mask == "frozen":
        sparsity.freeze(weight)
    elif mask == "shared":
        sparsity.use_mask(pyrx.nm_mask(torch.randn(6, 16), 3, 8, packed=True))
    return sparsity


@pytest.mark.parametrize("here", [None, "frozen", "shared"])
@pytest.mark.parametrize("there", [None, "frozen", "shared"])
def test_state_dicts_carry_everything(here, there):
    options = {"estimator": "mdgf", "strength": 0.5, "magnitude": False, "pad": True}
    saved, sparsity = layer(2, 4, decay=0.7, **options)
    changed(sparsity, W, there)
    loaded, other = layer(3, 3, pad=True, dim=0)
    if here:
        changed(other, torch.randn(6, 16), here)
    held = other.mask
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert state(other) == state(sparsity)
    assert other.frozen == (there == "frozen") and other.shared == (there == "shared")
    assert (other.mask is None) == (there is None)
    if there:
        assert torch.equal(other.mask, sparsity.mask)
        assert other.mask is held or here is None, "an owner's mask is loaded in place"
    assert other.target == (2, 4) and other.decay.item() == 0.3
    assert_same_bits(loaded.weight, saved.weight)
    assert other.mask is None or other.mask.data_ptr() != sparsity.mask.data_ptr()


def test_a_state_dict_is_of_tensors_and_of_one_form():
    """Whatever the masks: what averages, safetensors and distributed checkpoints need."""
    module, sparsity = layer(1, 128, dim=-1, strength=1 / 3, magnitude=False, pad=True)
    before = module.state_dict()
    assert all(isinstance(each, torch.Tensor) for each in before.values())
    changed(sparsity, W, "frozen")
    after = module.state_dict()
    assert [(name, x.shape, x.dtype) for name, x in after.items()] == [
        (name, x.shape, x.dtype) for name, x in before.items()
    ]
    # each with memory of its own
    assert len({x.data_ptr() for x in after.values()}) == len(after)
    sparsity.unfreeze()
    assert sparsity.mask is None and len(list(module.buffers())) == 2


def test_an_owners_mask_is_not_written_by_a_state_without_one():
    module, sparsity = layer()
    changed(sparsity, W, "shared")
    bits = sparsity.mask
    before = bits.clone()
    module.load_state_dict(layer()[0].state_dict())
    assert not sparsity.shared and torch.equal(bits, before)
    changed(sparsity, W, "shared")
    bits = sparsity.mask
    sparsity.use_mask(None)
    before = bits.clone()
    sparsity.freeze(torch.randn(6, 16))
    assert torch.equal(bits, before), "it is no longer this one's"


def test_safetensors(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    module, sparsity = layer(2, 8, strength=0.3)
    changed(sparsity, W, "frozen")
    files.save_file(module.state_dict(), tmp_path / "model.safetensors")
    loaded, other = layer(1, 4)
    loaded.load_state_dict(files.load_file(tmp_path / "model.safetensors"))
    assert state(other) == state(sparsity) and torch.equal(other.mask, sparsity.mask)


def test_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp

    module, sparsity = layer(2, 8, strength=0.3)
    changed(sparsity, W, "frozen")
    dcp.save({"model": module.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    loaded, other = layer(1, 4)
    held = {"model": loaded.state_dict()}
    dcp.load(held, checkpoint_id=tmp_path, no_dist=True)
    loaded.load_state_dict(held["model"])
    assert state(other) == state(sparsity) and torch.equal(other.mask, sparsity.mask)
    assert_same_bits(loaded.weight, module.weight)


def test_a_state_dict_whose_mask_is_missing_is_told():
    module, sparsity = layer()
    sparsity.freeze(W)
    held = module.state_dict()
    del held["parametrizations.weight.0.bits"]
    with pytest.raises(RuntimeError, match="Missing key.*parametrizations.weight.0.bits"):
        layer()[0].load_state_dict(held)


def test_state_dicts_without_sparsity_leave_the_state():
    module, sparsity = layer()
    sparsity.freeze(W)
    mask = sparsity.mask
    keys = module.load_state_dict({"bias": torch.zeros(6)}, strict=False)
    assert sparsity.mask is mask and sparsity.frozen
    assert "parametrizations.weight.0.bits" in keys.missing_keys
    again, other = layer()
    again.load_state_dict(module.state_dict(), assign=True)
    assert other.mask.data_ptr() == mask.data_ptr() and other.decay.data_ptr() == sparsity.decay.data_ptr()


@pytest.mark.parametrize("mask", [None, "frozen", "shared"])
def test_copies_are_independent(mask):
    module, sparsity = layer(estimator="mdgf")
    changed(sparsity, W, mask)
    for again in (copy.deepcopy(module), copy.deepcopy(nn.Sequential(module))[0]):
        other = again.parametrizations.weight[0]
        assert state(other) == state(sparsity) | {"shared": False}
        assert repr(again) == repr(module)
        used = {"mask": sparsity.mask} if mask == "frozen" else {}
        other.enabled = True
        assert_same_bits(again.weight, pyrx.nm_sparsify(W, 1, 8, estimator="mdgf", decay=0.3, **used))
        other.decay.zero_()
        other.n = 2
        if mask:
            other.bits.zero_()
            assert sparsity.mask.any()
        assert sparsity.decay.item() == 0.3 and sparsity.n == 1


def test_an_averaged_copy_has_masks_of_its_own_weights():
    """A copy that was made beside an optimizer's masks: nobody refreshes those that it has."""
    module, sparsity = layer()
    pyrx.optim.MaskedAdamW(module.parameters(), model=module)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    original = averaged.module.parametrizations.weight.original
    original.data.copy_(torch.randn(6, 16))
    assert_same_bits(averaged.module.weight, pyrx.nm_sparsify(original, 2, 4))
    assert sparsity.shared


def timm_ema(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)


def swa(model):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)


@pytest.mark.parametrize("when", ["first", "before the freeze", "last"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [timm_ema, swa, torch.optim.swa_utils.AveragedModel])
def test_averages(make, masked, when):
    """Made before or after an optimizer's masks and the freezing of them: the average of the dense weights, and masks
    of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 8))
    sparsify_(model, 2, 4, pad=True, estimator="sr-ste")
    first, sparsity = model[0].parametrizations.weight.original, model[0].parametrizations.weight[0]
    alone = nn.ParameterList([first])  # the average of the weights by themselves
    made = [make(model), make(alone)] if when == "first" else None
    if masked:
        optimizer = pyrx.optim.MaskedAdamW(model.parameters(), lr=0.1, model=model)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(4):
        if step == {"before the freeze": 0, "last": 2}.get(when):
            made = [make(model), make(alone)]
        if step == 1:
            sparsity.freeze(first)
        optimizer.zero_grad()
        model(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()
        for each, of in zip(made or (), (model, alone), strict=bool(made)):
            (each.update if make is timm_ema else each.update_parameters)(of)
    ema, expected = made[0].module, made[1].module[0]
    copied = ema[0].parametrizations.weight
    assert torch.equal(copied.original, expected)
    assert not torch.equal(expected, first)
    kept = sparsity.mask if when == "last" else None
    assert_same_bits(ema[0].weight, pyrx.nm_sparsify(expected, 2, 4, estimator="sr-ste", mask=kept))
    ema(torch.randn(5, 16))


def test_the_parametrization_alone_can_be_pickled():
    file = io.BytesIO()
    _, sparsity = layer(1, 4, estimator="mdgf-scaled", decay=0.5)
    sparsity.freeze(W)
    torch.save(sparsity, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_same_bits(other(W), sparsity(W))
    assert state(other) == state(sparsity) and torch.equal(other.mask, sparsity.mask)


def test_cached_weights_are_ranked_once(monkeypatch):
    module, _ = layer()
    calls = []
    from pyrx.nn import nm_sparsity as file

    monkeypatch.setattr(file, "nm_sparsify", lambda *a, **k: calls.append(1) or pyrx.nm_sparsify(*a, **k))
    with parametrize.cached():
        first = module.weight
        assert module.weight is first
        module(torch.randn(3, 16)).sum().backward()
    assert len(calls) == 1 and module.parametrizations.weight.original.grad is not None
    assert module.weight is not first and len(calls) == 2


def test_optimizers_train_the_original():
    torch.manual_seed(1)
    module, _ = layer()
    x, y = torch.randn(64, 16), torch.randn(64, 6)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert (module.weight == 0).sum() == 48 and module.parametrizations.weight.original.all()


# torch.compile.


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def losses_and_gradients(module, x):
    loss = module(x).square().sum()
    return loss, *torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="there Dynamo does not see that modules change")
@pytest.mark.parametrize("estimator", ["ste", "sr-ste", "mdgf-scaled"])
def test_compiled_layers(counter, estimator):
    module, sparsity = layer(estimator=estimator)
    fast = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(3, 16)

    def check(compiles):
        before = counter.frame_count
        for got, expected in zip(losses_and_gradients(fast, x), losses_and_gradients(module, x), strict=True):
            torch.testing.assert_close(got, expected)
        assert (counter.frame_count > before) == compiles

    check(True)
    for decay in (0.5, 0.25, 0.0):
        sparsity.decay.fill_(decay)
        check(False)
    sparsity.n = 1
    check(True)
    sparsity.enabled = False
    check(True)
    sparsity.enabled = True
    sparsity.freeze(module.parametrizations.weight.original)
    check(True)
    sparsity.mask.fill_(0x55)
    check(False)


# Several processes.


def train_distributed(rank, wrap, kind, **options):
    """Two ranks train a wrapped model as one that averages its gradients by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    sparsify_(model, 2, 4, **options)
    alone = copy.deepcopy(model)
    wrapped = wrap(model)
    schedules = [kind(each, 8, dense_steps=1, fine_tune_steps=2) for each in (model, alone)]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.05) for each in (wrapped, alone)]
    for step in range(8):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(10 * rank + step))
        for each, optimizer in zip((wrapped, alone), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
        gradients = averaged([parameter.grad for parameter in alone.parameters()])
        for parameter, gradient in zip(alone.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor() if hasattr(got, "full_tensor") else got, expected)
    for one, other in zip(model, alone, strict=True):
        assert torch.equal(one.parametrizations.weight[0].mask, other.parametrizations.weight[0].mask)
    torch.testing.assert_close(wrapped(x), alone(x))
    assert alone[0].weight.count_nonzero() == 64


def ddp(rank, _):
    wrap = nn.parallel.DistributedDataParallel
    train_distributed(rank, wrap, pyrx.nn.LinearMDGF, estimator="mdgf-scaled")
    train_distributed(rank, wrap, pyrx.nn.StepwiseSDGF, estimator="hard")


def fsdp(rank, _):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def wrap(model):
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
        return model

    train_distributed(rank, wrap, pyrx.nn.StepwiseSDGF, estimator="sr-ste")


@pytest.mark.slow
@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    torch.multiprocessing.spawn(with_process_group, args=(tmp_path / "rendezvous", worker), nprocs=2)


# On a GPU.


@pytest.mark.gpu
def test_schedules_on_the_gpu_do_not_wait_for_it():
    module = nn.Linear(16, 6).cuda()
    parametrize.register_parametrization(module, "weight", NMSparsity(1, 4, estimator="mdgf"))
    assert module.parametrizations.weight[0].decay.is_cuda, "the state follows the weight"
    x = torch.randn(3, 16, device="cuda")
    schedule = pyrx.nn.LinearMDGF(module, 6, dense_steps=1, fine_tune_steps=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            module(x).sum().backward()
            schedule.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = pyrx.nm_mask(module.parametrizations.weight.original, 1, 4)
    assert torch.equal(module.weight != 0, kept) and kept.sum() == 24

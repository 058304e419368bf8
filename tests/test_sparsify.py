"""sparsify_, desparsify_ and sparsity_report: what is installed, skipped, refused and told."""

import copy
import math

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn.utils import parametrize

import pyrx
from pyrx.nn import desparsify_, sparsify_, sparsity_report

W = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Layers of every kind that sparsify_ has an opinion on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16))
        self.grouped = nn.Conv1d(16, 8, 3, groups=2)
        self.volume = nn.Conv3d(8, 4, 1)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.ModuleDict({"hidden": nn.Linear(16, 12), "out": nn.Linear(12, 10)})
        self.embedding = nn.Embedding(7, 16)


def names(report):
    return [row.name for row in report.rows]


def reasons(report):
    return {row.name: row.reason for row in report.skipped}


def snapshot(model):
    return {name: (id(each), each.clone()) for name, each in model.named_parameters()}, repr(model)


def assert_unchanged(model, before):
    state, text = before
    assert repr(model) == text
    for (name, each), (other, (identity, value)) in zip(model.named_parameters(), state.items(), strict=True):
        assert name == other and id(each) == identity and torch.equal(each, value)


def test_what_is_installed_and_what_is_skipped():
    model = Mixed()
    report = sparsify_(model, 2, 4)
    assert names(report) == ["blocks.0", "grouped", "volume", "attention.out_proj", "head.hidden", "head.out"]
    rows = {row.name: row for row in report.rows}
    assert rows["blocks.0"][1:8] == ("Conv2d", (16, 8, 3, 3), 2, 4, 1, 1152, 576)
    assert rows["grouped"][1:8] == ("Conv1d", (8, 8, 3), 2, 4, 1, 192, 96)
    assert rows["volume"].kind == "Conv3d"
    assert rows["head.out"][1:] == ("Linear", (10, 12), 2, 4, -1, 120, 60, 0.5, "ste", 1.0, "sparse")
    assert reasons(report) == {
        "stem": "m = 4 does not divide dimension 1 of its weight, [8, 3, 3, 3]",
        "blocks.1": "depthwise: one input channel a group",
        "attention.in_proj_weight": "in neither a Linear nor a Conv layer",
        "embedding.weight": "in neither a Linear nor a Conv layer",
    }
    for row in report.rows:
        module = model.get_submodule(row.name)
        original = module.parametrizations.weight.original
        assert_same_bits(module.weight, pyrx.nm_sparsify(original, 2, 4, dim=row.dim))
    assert report.kept == report.parameters / 2 == sum(row.parameters for row in report.rows) / 2
    assert report.density == 0.5


def test_the_report_is_an_aligned_table():
    model = Mixed()
    text = str(sparsify_(model, 2, 4, per_layer={"head.out": {"m": 6, "estimator": "mdgf", "decay": 0.25}}))
    lines = text.split("skipped:")[0].strip().splitlines()
    assert lines[0].split() == "layer kind shape n:m dim parameters kept density estimator decay state".split()
    assert lines[1].split() == "blocks.0 Conv2d 16x8x3x3 2:4 1 1,152 576 0.5000 ste - sparse".split()
    assert lines[6].split() == "head.out Linear 10x12 2:6 -1 120 40 1.0000 mdgf 0.25 sparse".split()
    assert lines[-1].split()[0] == "total"
    for column in ("kind", "shape", "estimator", "state"):  # aligned to the left
        begin = lines[0].index(column)
        assert all(line[begin - 2 : begin] == "  " and line[begin] != " " for line in lines[1:-1])
    assert {line.index("0.5000") for line in lines[1:6]} == {lines[6].index("1.0000")}
    assert "  stem                      Conv2d" in text and "embedding.weight" in text
    assert str(sparsity_report(nn.Linear(4, 4))) == "no layer has N:M sparsity"
    alone = nn.Linear(4, 4)
    assert "(model)" in str(sparsify_(alone, 1, 4)) and alone.weight.count_nonzero() == 4


def test_padding_takes_what_m_does_not_divide():
    model = nn.Sequential(nn.Linear(10, 3), nn.Linear(2, 3), nn.Conv2d(3, 5, 1))
    report = sparsify_(model, 2, 4, pad=True)
    assert names(report) == ["0", "2"]
    assert reasons(report) == {"1": "no group of its weight, [3, 2], has more than n = 2 elements"}
    assert [row.kept for row in report.rows] == [18, 10]
    assert model[0].weight.count_nonzero() == 18 and model[2].weight.count_nonzero() == 10
    assert names(sparsify_(nn.Linear(4, 4), 4, 4)) == [""], "n = m is asked for"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"include": "head"}, ["head.hidden", "head.out"]),
        ({"include": "head.*"}, ["head.hidden", "head.out"]),
        ({"include": ["*.out", "volume"]}, ["volume", "head.out"]),
        ({"include": nn.Conv2d}, ["blocks.0"]),
        ({"include": [nn.MultiheadAttention, "head.hid*"]}, ["attention.out_proj", "head.hidden"]),
        ({"include": lambda name, module: module.weight.shape[0] == 12}, ["head.hidden"]),
        ({"include": lambda name, module: name.endswith("out")}, ["head.out"]),
        ({"exclude": ["head", nn.Conv2d]}, ["grouped", "volume", "attention.out_proj"]),
        ({"exclude": lambda name, module: isinstance(module, nn.Linear)}, ["blocks.0", "grouped", "volume"]),
        ({"include": nn.Linear, "exclude": "head"}, ["attention.out_proj"]),
        ({"include": "head", "per_layer": {"head.out": None}}, ["head.hidden"]),
        ({"per_layer": {"*": None, "head.out": (1, 2)}}, ["head.out"]),
    ],
)
def test_what_is_included_and_excluded(options, expected):
    report = sparsify_(Mixed(), 2, 4, **options)
    assert names(report) == expected
    for name in {"blocks.0", "grouped", "head.out"} - set(expected):
        assert reasons(report)[name] in ("excluded", "not included", "None in per_layer")


def test_layers_may_differ():
    model = Mixed()
    special = {"head": (1, 4), "head.out": {"m": 6, "estimator": "sr-ste"}, "volume": [4, 8], "stem": (2, 3)}
    report = sparsify_(model, 2, 4, per_layer=special, estimator="hard", strength=0.5)
    found = {row.name: (row.n, row.m, row.estimator) for row in report.rows}
    assert found == {
        "stem": (2, 3, "hard"),
        "blocks.0": (2, 4, "hard"),
        "grouped": (2, 4, "hard"),
        "volume": (4, 8, "hard"),
        "attention.out_proj": (2, 4, "hard"),
        "head.hidden": (1, 4, "hard"),
        "head.out": (2, 6, "sr-ste"),
    }
    assert model.head["out"].parametrizations.weight[0].strength == 0.5
    other = nn.Linear(8, 6)
    sparsify_(other, 1, 2, dim=0)
    assert_same_bits(other.weight, pyrx.nm_sparsify(other.parametrizations.weight.original, 1, 2, dim=0))


@pytest.mark.parametrize(
    "arguments, options, error, text",
    [
        ((5, 4), {}, ValueError, "expected n in [1, 4], got 5"),
        ((0, 4), {}, ValueError, "expected n in [1, 4], got 0"),
        ((2, 129), {}, ValueError, "expected m in [1, 128], got 129"),
        ((2.0, 4), {}, TypeError, "expected n to be an int, got float"),
        ((2, 4), {"include": "haed"}, ValueError, "expected include to match Linear or Conv layers each, got 'haed'"),
        ((2, 4), {"include": ["head", nn.LSTM]}, ValueError, "got <class 'torch.nn.modules.rnn.LSTM'>, which matches"),
        ((2, 4), {"include": [3]}, TypeError, "expected include of globs, module types and predicates, got int"),
        ((2, 4), {"include": "embedding"}, ValueError, "'embedding', which matches none"),
        ((2, 4), {"exclude": "haed.*"}, ValueError, "expected exclude to match modules each, got 'haed.*'"),
        ((2, 4), {"per_layer": {"haed": None}}, ValueError, "expected per_layer to match Linear or Conv layers each"),
        ((2, 4), {"per_layer": "head"}, TypeError, "expected per_layer to be a mapping of globs, got str"),
        ((2, 4), {"per_layer": {"head": 3}}, TypeError, "expected per_layer['head'] to be (n, m), None or a dict"),
        ((2, 4), {"per_layer": {"head": (5, 4)}}, ValueError, "expected n in [1, 4], got 5"),
        ((2, 4), {"per_layer": {"head.out": {"estimtor": 1}}}, TypeError, "estimtor"),
        ((2, 4), {"estimator": "STE"}, ValueError, "expected estimator to be one of 'ste', 'sr-ste'"),
        ((2, 4), {"decay": 1.5}, ValueError, "expected decay in [0, 1], got 1.5"),
        ((2, 4), {"decay": math.nan}, ValueError, "expected decay in [0, 1], got nan"),
        ((2, 4), {"strength": "x"}, TypeError, "expected strength to be a float, got str"),
        ((2, 4), {"pad": torch.ones(2)}, TypeError, "expected pad to be a bool, got Tensor"),
        ((2, 4), {"magnitude": 1}, TypeError, "expected magnitude to be a bool, got int"),
        ((2, 4), {"dim": 2}, ValueError, "expected dim in [-2, 1] for layer 'attention.out_proj', got 2"),
        ((2, 4), {"backend": "cuda"}, RuntimeError, "expected backend that serves torch.float32 on cpu"),
        ((2, 4), {"per_layer": {"head.out": {"backend": "cuda"}}}, RuntimeError, "expected backend that serves"),
    ],
)
def test_bad_arguments_change_nothing(arguments, options, error, text):
    model = Mixed()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        sparsify_(model, *arguments, **options)
    assert text in str(caught.value)
    assert_unchanged(model, before)


def test_parametrized_layers_are_refused():
    model = Mixed()
    sparsify_(model, 2, 4, include="head.out")
    before = snapshot(model)
    text = "expected layer 'head.out' without a parametrization of its weight, got NMSparsity"
    with pytest.raises(ValueError, match=text):
        sparsify_(model, 2, 4)
    assert_unchanged(model, before)
    report = sparsify_(model, 1, 4, exclude="head.out")
    assert "head.out" not in names(report) and reasons(report)["head.out"] == "excluded"
    assert [row.n for row in sparsity_report(model).rows] == [1] * 5 + [2]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="layer '0' without a parametrization of its weight, got _WeightNorm"):
        sparsify_(normed, 2, 4)
    with pytest.raises(TypeError, match=r"pyrx::sparsify_: expected model to be a torch.nn.Module, got Tensor"):
        sparsify_(W, 2, 4)


def test_tied_weights_are_skipped_and_shared_modules_handled_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 16), "out": nn.Linear(16, 8), "a": nn.Linear(16, 16)})
    model["out"].weight = model["embedding"].weight
    model["again"] = model["a"]
    report = sparsify_(model, 2, 4)
    assert names(report) == ["a"] and reasons(report)["out"] == "its weight is tied to embedding.weight"
    assert model["again"].weight.count_nonzero() == 128 and len(sparsity_report(model).rows) == 1
    other = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    other[1].weight = other[0].weight
    assert set(reasons(sparsify_(other, 2, 4)).values()) == {
        "its weight is tied to 1.weight",
        "its weight is tied to 0.weight",
    }
    # by its other name
    assert names(sparsify_(desparsify_(model), 2, 4, include="again")) == ["a"]
    # with a layer that is sparse already
    model["late"] = nn.Linear(16, 16)
    model["late"].weight = model["a"].parametrizations.weight.original
    assert "is tied to a.parametrizations.weight.original" in reasons(sparsify_(model, 2, 4, include="late"))["late"]


def test_weights_that_cannot_be_sparse_are_skipped():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 8), nn.Conv2d(1, 4, 3))
    del model[2].weight
    model[2].weight = torch.randn(8, 8)
    assert reasons(sparsify_(model, 2, 4)) == {
        "0": "its weight has no shape yet: run it once first",
        "1": "its weight is of dtype torch.complex64",
        "2": "its weight is not a parameter",
        "3": "it has one input channel",
    }


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("state", ["sparse", "dense", "frozen"])
def test_desparsify(leave_parametrized, state):
    model = Mixed()
    kind, text = type(model.head["out"]), repr(model)
    parameters = {name: (each, each.detach().clone()) for name, each in model.named_parameters()}
    report = sparsify_(model, 2, 4)
    for row in report.rows:
        sparsity, original = (lambda each: (each[0], each.original))(
            model.get_submodule(row.name).parametrizations.weight
        )
        if state == "frozen":
            sparsity.freeze(torch.randn_like(original))
        sparsity.enabled = state != "dense"
    expected = {row.name: model.get_submodule(row.name).weight.detach().clone() for row in report.rows}
    assert desparsify_(model, leave_parametrized) is model
    assert repr(model) == text and type(model.head["out"]) is kind and not sparsity_report(model).rows
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    for name, each in model.named_parameters():
        identity, value = parameters.pop(name)
        assert each is identity
        owner = name.removesuffix(".weight")
        assert_same_bits(each, expected[owner] if leave_parametrized and owner in expected else value)
    assert not parameters
    with pytest.raises(TypeError, match="expected leave_parametrized to be a bool, got int"):
        desparsify_(model, 1)
    desparsify_(model)
    assert names(sparsify_(model, 2, 4)) == names(report)


@pytest.mark.parametrize("of_copy", [True, False])
def test_removing_it_from_a_copy_leaves_the_other(of_copy):
    """As for an export in mid-training."""
    model = Mixed()
    sparsify_(model, 2, 4)
    again = copy.deepcopy(model)
    desparsified, kept = (again, model) if of_copy else (model, again)
    desparsify_(desparsified)
    for name in ("head.out", "volume", "attention.out_proj"):
        one, other = desparsified.get_submodule(name), kept.get_submodule(name)
        assert_same_bits(one.weight, other.weight)
        assert type(one).__name__ == parametrize.type_before_parametrizations(other).__name__
    assert len(sparsity_report(kept).rows) == 6 and not sparsity_report(desparsified).rows
    desparsify_(kept)


def test_chained_parametrizations_are_told_and_not_removed():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify_(model, 2, 4)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert len(sparsity_report(model).rows) == 1
    with pytest.raises(ValueError, match="layer '0' with NMSparsity as the only parametrization of its weight"):
        desparsify_(model)
    assert parametrize.is_parametrized(model[0])


def test_reports_measure_the_weights():
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(8, 3))
    sparsify_(model, 2, 4, per_layer={"1": {"estimator": "mdgf", "decay": 0.25}})
    with torch.no_grad():
        model[0].parametrizations.weight.original[0].zero_()
    model[2].parametrizations.weight[0].enabled = False
    model[1].parametrizations.weight[0].freeze(W)
    report = sparsity_report(model)
    assert [row.density for row in report.rows] == [40 / 96, 1.0, 1.0]
    assert [row.state for row in report.rows] == ["sparse", "frozen", "dense"]
    assert [row.decay for row in report.rows] == [1.0, 0.25, 1.0]
    assert report.parameters == 216 and report.kept == 108 and report.density == (40 + 96 + 24) / 216
    model[1].parametrizations.weight[0].decay.zero_()
    assert sparsity_report(model).rows[1].density == 0.5
    with torch.device("meta"):
        away = nn.Linear(8, 8)
    report = sparsify_(away, 2, 4)
    assert away.weight.is_meta and math.isnan(report.rows[0].density) and report.kept == 32


def test_attention_works_with_its_sparse_projection():
    torch.manual_seed(2)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    dense = copy.deepcopy(attention)
    assert names(sparsify_(attention, 2, 4)) == ["out_proj"]
    with torch.no_grad():
        dense.out_proj.weight.copy_(attention.out_proj.weight)
    x = torch.randn(3, 5, 16)
    for mode in (True, False):  # in eval it takes torch's fast path
        with torch.set_grad_enabled(mode):
            found, expected = (each.train(mode)(x, x, x, need_weights=False)[0] for each in (attention, dense))
            torch.testing.assert_close(found, expected)
    attention.train()(x, x, x)[0].square().sum().backward()
    dense.train()(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(attention.out_proj.parametrizations.weight.original.grad, dense.out_proj.weight.grad)


def test_channels_last_weights_stay_so():
    model = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    sparsify_(model, 2, 4)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    desparsify_(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)

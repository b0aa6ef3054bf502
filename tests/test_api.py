"""What Python users call: `fit`, `certify`, `radius`, `bounds`, `margins`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

import tightrope as tr
from tightrope.api import device_for, find_device, resolve
from tightrope.bounds import Interval, Problem
from tightrope.bounds.rounding import plain_sums
from tightrope.data import Split, as_source
from tightrope.errors import InputError, RecipeError, UnsupportedOperatorError
from tightrope.graph import trace
from tightrope.parallel import Workers
from tightrope.recipes import DEFAULT_TRAINING, parse_recipe, read_recipe
from tightrope.spec import Spec


def examples(count: int) -> Split:
    """Points of the unit square in two classes, left and right."""
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    return Split(x, (x[:, 0] > 0.5).long())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))


class Homemade(Dataset[Any]):
    """A map-style data set of `(x, y)`, as users write them."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.tensor([index / 50, 0.5])
        return x, int(x[0] > 0.5)


def is_same(one: nn.Module, other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


# ---------------------------------------------------------------------------------------------- fit


@pytest.fixture
def run(tmp_path) -> tr.Run:
    return tr.fit(network(), examples(100), tr.methods.ibp(eps=0.05), epochs=2, lr=0.01, out=tmp_path / "run")


def test_fit_returns_the_trained_network_and_its_folder(run):
    assert not run.model.training
    assert is_same(run.model, load_file(run.path / "model.safetensors"))
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    assert run.metrics()[-1]["held_out"]["examples"] == 10


def test_fit_trains_and_counts_in_the_norm_that_is_said(run, tmp_path):
    found = {"inf": run}
    for norm in ("2", "1"):
        found[norm] = tr.fit(
            network(),
            examples(100),
            tr.methods.ibp(eps=0.05),
            norm=norm,
            epochs=2,
            lr=0.01,
            out=tmp_path / norm,
        )
    robust = {norm: one.metrics()[-1]["losses"]["robust"] for norm, one in found.items()}
    assert robust["1"] < robust["2"] < robust["inf"]
    with pytest.raises(tr.InputError, match="norm"):
        tr.fit(
            network(),
            examples(100),
            tr.methods.ibp(eps=0.05),
            epochs=2,
            lr=0.01,
            out=tmp_path / "1",
            resume=True,
        )


def test_fit_with_a_seed_gives_the_same_weights_again(run, tmp_path):
    again = tr.fit(
        network(), examples(100), tr.methods.ibp(eps=0.05), epochs=2, lr=0.01, out=str(tmp_path / "again")
    )
    assert is_same(again.model, run.model.state_dict())


@pytest.mark.parametrize(
    "train_set",
    [
        examples(50),
        (examples(50).x, examples(50).y),
        TensorDataset(examples(50).x, examples(50).y),
        Homemade(),
        DataLoader(Homemade(), batch_size=100, shuffle=True),
    ],
    ids=["Split", "tensors", "TensorDataset", "Dataset", "DataLoader"],
)
def test_fit_takes_any_map_style_data_set(train_set, tmp_path):
    run = tr.fit(network(), train_set, tr.methods.ibp(eps=0.05), epochs=1, out=tmp_path)
    assert run.metrics()[-1]["held_out"]["examples"] == 5


@pytest.mark.parametrize(
    "how",
    [{"batch_size": 3}, {"batch_sampler": BatchSampler(SequentialSampler(range(50)), 3, False)}],
    ids=["batch_size", "batch_sampler"],
)
def test_a_loader_whose_batches_are_of_another_size_is_read_with_a_warning(how, tmp_path):
    loader = DataLoader(Homemade(), **how)
    with pytest.warns(UserWarning, match="batches are of batch=5, not of 3"):
        tr.fit(network(), loader, tr.methods.ibp(eps=0.05), epochs=1, batch=5, out=tmp_path)


def test_fit_trains_as_the_command_line_does_where_nothing_is_said(tmp_path):
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    tr.fit(net, examples(100), tr.methods.shi_ibp(eps=0.05), epochs=1, out=tmp_path)
    said = (tmp_path / "recipe.toml").read_text()
    default = DEFAULT_TRAINING["shi-ibp"]
    assert f"batch = {default.batch}" in said
    assert f"clip = {default.clip}" in said


def test_a_part_of_the_learning_rate_changes_that_part_of_the_methods_own(tmp_path):
    lr = {"start": 5e-3}
    tr.fit(network(), examples(100), tr.methods.ibp(eps=0.05), epochs=1, lr=lr, out=tmp_path)
    recipe = parse_recipe(read_recipe(tmp_path / "recipe.toml"), "recipe.toml")
    assert recipe.training.lr == tr.Steps(start=5e-3, factor=0.1, at=(0.25, 0.42))
    assert lr == {"start": 5e-3}


def test_a_method_of_ones_own_can_be_fitted(tmp_path):
    from tightrope.train import Loss, Method, terms

    mine = Method("mine", 0.05, (Loss("natural", 1.0, terms.natural),))
    assert tr.fit(network(), examples(50), mine, epochs=1, out=tmp_path).metrics()


def test_a_folder_is_fitted_in_once_and_resumed_on_demand(run):
    arguments = (network(), examples(100), tr.methods.ibp(eps=0.05))
    with pytest.raises(InputError, match="already holds a run"):
        tr.fit(*arguments, epochs=2, lr=0.01, out=run.path)
    resumed = tr.fit(*arguments, epochs=2, lr=0.01, out=run.path, resume=True)
    assert is_same(resumed.model, run.model.state_dict())
    with pytest.raises(InputError, match=r"training\.epochs: 2 there, 3 now"):
        tr.fit(*arguments, epochs=3, lr=0.01, out=run.path, resume=True)


def test_a_run_from_python_says_how_it_can_be_certified(run):
    assert json.loads((run.path / "model.json").read_text())["name"] is None
    with pytest.raises(InputError, match="trained from Python"):
        tr.targets.load_target(str(run.path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"epoch": 3}, r"unknown key epoch .*epochs"),
        ({"epochs": 0}, r"cannot be used: epochs: "),
        ({"lr": float("nan")}, r": lr: "),
        ({"optimiser": "adma"}, r": optimiser: .*'adam'"),
        ({"seed": -1}, "seed"),
        ({"test_eps": -0.1}, "test_eps"),
        ({"test_eps": float("nan")}, "test_eps"),
        ({"held_out": 0}, "held_out"),
        ({"norm": "3"}, "norm"),
    ],
)
def test_fit_refuses_settings_by_name(arguments, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        tr.fit(network(), examples(50), tr.methods.ibp(eps=0.05), out=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("net", "data", "said"),
    [
        (nn.Linear(3, 2), examples(50), r"inputs of shape \(2,\)"),
        (nn.Linear(2, 1), examples(50), "1 outputs, but the data has the label 1"),
        (nn.Linear(2, 2).requires_grad_(False), examples(50), "no parameters to train"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), examples(50), r"1 \(Softmax\)"),
        (network(), TensorDataset(torch.full((9, 2), torch.nan), torch.zeros(9).long()), "NaN"),
        (network(), TensorDataset(torch.rand(9, 2), -torch.ones(9).long()), "labels"),
        (network(), 3, "map-style"),
    ],
)
def test_fit_refuses_a_network_or_data_it_cannot_use(net, data, said, tmp_path):
    with pytest.raises(InputError, match=said):
        tr.fit(net, data, tr.methods.ibp(eps=0.05), epochs=1, held_out=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_that_are_gone_are_missed_by_name(run):
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl is empty"):
        run.metrics()
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        run.metrics()


@pytest.mark.parametrize(("count", "held_out"), [(5, 1), (200, 20), (60_000, 1000)])
def test_small_data_sets_hold_out_a_tenth(count, held_out):
    recipe = parse_recipe({"method": {"name": "ibp", "eps": 0.1}}, "a test")
    method = recipe.build_method()
    resolved = resolve(recipe, method, range(count))
    assert (resolved.held_out, resolved.test_eps) == (held_out, 0.1)
    assert resolve(resolved, method, range(7)) == resolved


# ------------------------------------------------------------------------------------------ certify


def test_certify_yields_verdicts_and_their_sum(run):
    result = tr.certify(run.model, examples(40), tr.Box(eps=0.05))
    statuses = [verdict.status for verdict in result]
    summary = result.summary()
    assert len(statuses) == summary["examples"] == 40
    assert statuses.count("robust") == summary["robust"]


@pytest.mark.parametrize("verifier", ["ibp", "crown", "cascade"])
def test_certify_says_the_same_in_inference_mode(run, verifier):
    region = tr.Box(eps=0.02)
    usual = tr.certify(run.model, examples(20), region, verifier=verifier)
    with torch.inference_mode():
        there = tr.certify(run.model, examples(20), region, verifier=verifier)
    assert [v.status for v in there] == [v.status for v in usual]


def test_certify_leaves_the_network_as_it_was(run):
    run.model.train()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    tr.certify(run.model, examples(10), tr.Box(eps=0.05))
    assert run.model.training
    assert is_same(run.model, before)
    assert next(run.model.parameters()).dtype == torch.float32


def test_certify_goes_on_with_a_file_of_the_same_question_only(run, tmp_path):
    out = tmp_path / "verdicts.jsonl"
    first = tr.certify(run.model, examples(40), tr.Box(eps=0.05), out=out, first=10)
    whole = tr.certify(run.model, examples(40), tr.Box(eps=0.05), out=out, resume=True)
    assert list(whole)[:10] == list(first)
    with pytest.raises(InputError, match="already exists"):
        tr.certify(run.model, examples(40), tr.Box(eps=0.05), out=out)
    with pytest.raises(InputError, match=r"eps: 0\.05 there, 0\.1 now"):
        tr.certify(run.model, examples(40), tr.Box(eps=0.1), out=out, resume=True)
    with pytest.raises(InputError, match="data"):
        tr.certify(run.model, examples(41), tr.Box(eps=0.05), out=out, resume=True)
    with pytest.raises(InputError, match="weights"):
        tr.certify(network(), examples(40), tr.Box(eps=0.05), out=out, resume=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"verifier": "ipb"}, "'ipb'"),
        ({"first": 0}, "a whole number from 1 up"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_certify_refuses_options_by_name(run, arguments, said):
    with pytest.raises(InputError, match=said):
        tr.certify(run.model, examples(10), tr.Box(eps=0.05), **arguments)


def test_certify_refuses_labels_the_network_does_not_know(run):
    data = TensorDataset(torch.rand(5, 2), torch.arange(5))
    with pytest.raises(InputError, match="2 outputs, but the data has the label 4"):
        tr.certify(run.model, data, tr.Box(eps=0.05))


# ------------------------------------------------------------------------------------------- radius


@pytest.mark.parametrize("region", [tr.Box(eps=0.5), tr.L2Ball(eps=0.5), tr.L1Ball(eps=0.5)])
def test_radius_finds_an_eps_for_each_example_that_certify_certifies(run, region):
    result = tr.radius(run.model, examples(20), region, verifier="crown")
    assert [one.index for one in result] == list(range(20))
    assert result.summary()["norm"] == region.norm
    half = tr.certify(run.model, examples(20), region.with_eps(0.25), verifier="crown", attack=None)
    assert {one.index for one in result if one.radius >= 0.25} == {
        one.index for one in half if one.status == "robust"
    }
    assert result.certified_accuracy(0.25) == half.summary()["certified_accuracy"]


def test_radius_goes_on_with_a_file_of_the_same_question_only(run, tmp_path):
    out = tmp_path / "radii.jsonl"
    first = tr.radius(run.model, examples(40), tr.Box(eps=0.5), out=str(out), first=10)
    whole = tr.radius(run.model, examples(40), tr.Box(eps=0.5), out=out, resume=True, batch=15)
    assert list(whole)[:10] == list(first)
    with pytest.raises(InputError, match=r"tolerance: 0\.001 there, 0\.1 now"):
        tr.radius(run.model, examples(40), tr.Box(eps=0.5), out=out, resume=True, tolerance=0.1)


def test_radius_leaves_the_network_as_it_was(run):
    run.model.train()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    tr.radius(run.model, examples(10), tr.Box(eps=0.05))
    assert run.model.training
    assert is_same(run.model, before)


# -------------------------------------------------------------------------------- bounds and margins


ENGINES = {
    "interval": tr.engines.interval(),
    "fast-lin": tr.engines.fast_lin(),
    "crown": tr.engines.crown(),
    "crown-ibp": tr.engines.crown_ibp(),
    "intersect": tr.engines.intersect(tr.engines.fast_lin(), tr.engines.crown()),
    "mix": tr.engines.mix(tr.engines.crown_ibp(), tr.engines.interval(), 0.5),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_bounds_hold_everywhere_in_the_region(engine):
    net, x = network(), examples(5).x
    bounds = tr.bounds(net, x, tr.Box(eps=0.1), engine=engine)
    moved = (x + 0.2 * (torch.rand(1000, 5, 2) - 0.5)).clamp(0, 1)
    logits = net(moved)
    assert bool((bounds.lower - 1e-6 <= logits).all())
    assert bool((logits <= bounds.upper + 1e-6).all())
    assert bounds.guarantee == "sound"


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_margins_are_lower_bounds_that_can_be_trained_on(engine):
    net, data = network(), examples(5)
    margins = tr.margins(net, data.x, data.y, tr.Box(eps=0.1), engine=engine)
    logits = net(data.x)
    clean = logits.gather(1, data.y[:, None]) - logits
    assert margins.shape == (5, 2)
    assert bool((margins <= clean + 1e-6).all())
    margins.sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("engine", [*ENGINES.values(), tr.engines.alpha_crown(), tr.engines.zonotope()])
def test_of_no_example_there_are_no_bounds(engine):
    bounds = tr.bounds(network(), torch.zeros(0, 2), tr.Box(eps=0.1), engine=engine)
    assert bounds.lower.shape == bounds.upper.shape == (0, 2)


def test_bounds_by_gradients_say_where_there_are_none():
    with torch.inference_mode(), pytest.raises(InputError, match=r"torch\.no_grad"):
        tr.bounds(network(), examples(5).x, tr.Box(eps=0.1), engine=tr.engines.alpha_crown())


def test_interval_bounds_can_be_differentiated_by_torch_func():
    net, x = network(), examples(5).x

    def lower(x):
        graph = trace(net, (2,))
        return Interval()(Problem(graph, x, tr.Box(eps=0.1), Spec.logits(len(x), 2, x))).lower

    by_func, by_autograd = torch.func.jacrev(lower)(x), torch.autograd.functional.jacobian(lower, x)
    torch.testing.assert_close(by_func, by_autograd)


@pytest.mark.parametrize("region", [tr.Box(0.0), tr.L2Ball(0.0), tr.L1Ball(0.0)])
def test_at_eps_0_the_bounds_are_the_logits(region):
    net, x = network(), examples(5).x
    bounds = tr.bounds(net, x, region)
    torch.testing.assert_close(bounds.lower, net(x))
    torch.testing.assert_close(bounds.upper, net(x))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.rand(4, 3), r"inputs of shape \(3,\)"),
        (torch.tensor(0.5), r"shape \(\)"),
        (torch.rand(4, 2).double(), "float32.*float64"),
        (torch.ones(4, 2, dtype=torch.uint8), "float32.*uint8"),
        (torch.full((4, 2), torch.nan), "NaN"),
        (torch.full((4, 2), 1.5), r"\[0, 1\], got 1.5"),
    ],
)
def test_bounds_refuse_inputs_they_cannot_use(x, said):
    with pytest.raises(InputError, match=said):
        tr.bounds(network(), x, tr.Box(eps=0.1))


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.tensor([0, 1, 2]), "0..1.*got 0..2"),
        (torch.tensor([0, -1, 1]), "got -1..1"),
        (torch.tensor([0, 1]), "3 class numbers"),
        (torch.tensor([[0], [1], [1]]), "3 class numbers"),
        (torch.tensor([0.0, 1.0, 1.0]), "float32"),
    ],
)
def test_margins_refuse_labels_they_cannot_use(y, said):
    with pytest.raises(InputError, match=said):
        tr.margins(network(), torch.rand(3, 2), y, tr.Box(eps=0.1))


def test_every_unsupported_operator_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.Softmax(1)))
    with pytest.raises(UnsupportedOperatorError, match=r"(?s)1 \(GELU\).*2\.0 \(Softmax\)"):
        tr.bounds(net, torch.rand(3, 2), tr.Box(eps=0.1))


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_radius_must_be_a_length(eps):
    for region in (tr.Box, tr.L2Ball, tr.L1Ball):
        with pytest.raises(InputError, match="eps must be finite and not negative"):
            region(eps)
    with pytest.raises(InputError, match="eps"):
        tr.methods.ibp(eps=eps)


def test_devices_go_by_name():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match=f"no device '{name}'"):
            find_device(name)


def test_of_a_large_dataset_only_the_first_examples_are_read():
    read = set()

    class Large(Dataset):
        def __len__(self):
            return 100_000

        def __getitem__(self, index):
            read.add(index)
            return torch.tensor([0.2, 0.7]), 7 if index == 99_000 else index % 2

    for ask in (tr.certify, tr.radius):
        assert len(ask(network(), Large(), BOX, first=5)) == 5
    assert len(read) <= 5 + 16  # of 16 the identity is made
    with pytest.raises(InputError, match="the number of examples must be a whole number"):
        tr.certify(network(), Large(), BOX, first=2.5)


@pytest.mark.parametrize("ask", [tr.certify, tr.radius])
def test_warnings_are_about_the_line_that_called(ask):
    with pytest.warns(UserWarning, match=r"eps 1.5 is wider") as caught:
        ask(network(), examples(5), tr.Box(1.5))
    assert [warning.filename for warning in caught] == [__file__]


def test_programs_are_solved_on_the_cpu_even_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for(Workers(), "auto").type == "cuda"
    assert device_for(Workers(), "auto", "milp").type == "cpu"
    monkeypatch.setattr("tightrope.api.find_device", torch.device)
    with pytest.raises(
        InputError, match="milp solves its programs on the CPU, not on cuda: take --device cpu"
    ):
        device_for(Workers(), "cuda", "milp")


def test_a_source_on_another_device_is_refused(tmp_path):
    source = as_source(examples(20))
    source.device = torch.device("cuda")
    for ask in (tr.certify, tr.radius):
        with pytest.raises(
            InputError, match=r'on cuda, the network is to be on cpu: .*as_source\(data, "cpu"'
        ):
            ask(network(), source, BOX, device="cpu")


def test_a_source_of_one_s_own_need_not_say_its_device(tmp_path):
    source = as_source(examples(5))
    source.device = "cpu"
    assert len(tr.certify(network(), source, BOX)) == 5


def test_verdicts_leave_torch_s_settings_alone():
    before, precision = torch.backends.cudnn.enabled, torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"  # torch's other settings may not be read then
    try:
        tr.certify(network(), examples(5), BOX)
        tr.bounds(network(), examples(5).x, BOX)
    finally:
        torch.backends.fp32_precision = precision
    assert torch.backends.cudnn.enabled == before
    with plain_sums(), plain_sums():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before


def test_what_the_package_promises_is_there():
    assert all(hasattr(tr, name) for name in tr.__all__)
    assert Path(tr.__file__).with_name("py.typed").exists()


# ------------------------------------------------------------------------------------ what is no such thing


BOX = tr.Box(eps=0.1)
UNCALLED: Any = tr.engines.crown


@pytest.mark.parametrize(
    ("call", "said"),
    [
        pytest.param(lambda net, x, out: tr.bounds(net, x, 0.3), "the region must be a Region", id="number"),
        pytest.param(lambda net, x, out: tr.bounds("net", x, BOX), "the model must be a Module", id="word"),
        pytest.param(
            lambda net, x, out: tr.bounds(net, x.tolist(), BOX), "the inputs must be a Tensor", id="list"
        ),
        pytest.param(lambda net, x, out: tr.bounds(net, x, BOX, "crown"), r"engines\.crown\(\)", id="name"),
        pytest.param(
            lambda net, x, out: tr.bounds(net, x, BOX, UNCALLED), r"made by a call", id="uncalled engine"
        ),
        pytest.param(
            lambda net, x, out: tr.bounds(net, x, BOX, tr.engines.hybrid_zonotope),
            r"made by a call",
            id="uncalled class",
        ),
        pytest.param(
            lambda net, x, out: tr.bounds(net, x, BOX, 3), r"made by a call, such as .*; got 3", id="a number"
        ),
        pytest.param(
            lambda net, x, out: tr.margins(net, x, torch.zeros(len(x)).long(), BOX, tr.engines.projected()),
            r"Projected\(.* yields estimates, which prove nothing",
            id="estimator",
        ),
        pytest.param(
            lambda net, x, out: tr.fit(net, examples(20), tr.methods.ibp, out=out),
            r"the method must be a Method, for example tightrope\.methods\.ibp\(eps=0\.3\)",
            id="uncalled method",
        ),
        pytest.param(
            lambda net, x, out: tr.methods.ibp(eps=0.1) | tr.reweight,
            "call the modifier",
            id="uncalled modifier",
        ),
        pytest.param(
            lambda net, x, out: tr.fit(net, examples(20), tr.methods.ibp(eps=0.1), augment={}, out=out),
            "augment must be an Augment|training",
            id="table",
        ),
        pytest.param(
            lambda net, x, out: tr.fit(net.double(), examples(20), tr.methods.ibp(eps=0.1), out=out),
            r"trained in float32, this one has parameters of torch\.float64: give model\.float\(\)",
            id="precision",
        ),
        pytest.param(
            lambda net, x, out: tr.fit(net, examples(20), tr.methods.ibp(eps=0.1), out=out, epoch=3),
            "unknown key epoch .did you mean 'epochs'",
            id="keyword",
        ),
        pytest.param(
            lambda net, x, out: tr.certify(net, examples(20), BOX, attack="pgd"), "the attack", id="attack"
        ),
        pytest.param(lambda net, x, out: tr.certify(net, examples(20), 0.1), "the region", id="radius"),
        pytest.param(lambda net, x, out: tr.certify(net, examples(20), BOX, seed=-1), "seed", id="seed"),
        pytest.param(
            lambda net, x, out: tr.certify(net, examples(20), BOX, resume=True),
            "nothing to resume",
            id="resume",
        ),
        pytest.param(lambda net, x, out: tr.Box(eps="8/255"), "eps must be .* got '8/255'", id="fraction"),
        pytest.param(
            lambda net, x, out: tr.bounds(nn.LazyLinear(2), x, BOX), "`weight` has no shape yet", id="lazy"
        ),
        pytest.param(
            lambda net, x, out: tr.certify(nn.utils.weight_norm(nn.Linear(2, 2)), examples(20), BOX),
            "cannot be copied .*parametrizations",
            id="hook",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
        ),
    ],
)
def test_what_is_no_such_thing_is_named_with_what_would_be(call, said, tmp_path):
    with pytest.raises(InputError, match=said):
        call(network(), torch.rand(3, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tr.reweight(gamma=-1), r"reweight cannot be used: gamma: .* greater than 0 \(got -1\)"),
        (lambda: tr.reweight(alpha=float("nan")), "alpha"),
        (lambda: tr.methods.diffai(eps=0.1, domain="hbox"), "domain: Input should be 'box', .*hbox"),
        (lambda: tr.methods.sabr(eps=0.1, share=2.0), "share"),
        (lambda: tr.methods.ibp(eps=None), "eps"),
    ],
)
def test_options_are_checked_as_those_of_a_recipe(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_options_are_read_as_those_of_a_recipe():
    assert tr.methods.ibp(eps="8/255").options["eps"] == 8 / 255


def test_labels_of_any_integer_are_class_numbers():
    net, x, y = network(), torch.rand(4, 2), torch.tensor([0, 1, 1, 0])
    wanted = tr.margins(net, x, y, BOX)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(tr.margins(net, x, y.to(dtype), BOX), wanted)
    with pytest.raises(InputError, match="class numbers"):
        tr.margins(net, x, y.bool(), BOX)

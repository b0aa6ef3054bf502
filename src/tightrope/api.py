"""What Python users call: `fit`, `certify`, `radius`, `bounds`, `margins`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float, Integer
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Engine, Estimate, Estimator, Interval, Problem
from tightrope.bounds.base import sound
from tightrope.data import Augment, DataSet, Source, as_source, hold_out
from tightrope.data.source import LoaderSource
from tightrope.errors import FileError, InputError, RecipeError, warn
from tightrope.files import check_line, fingerprint, locked, read_lines, to_json, write_atomically
from tightrope.given import whole
from tightrope.graph import Graph, check_training_mode, trace
from tightrope.models import build
from tightrope.parallel import Workers
from tightrope.provenance import environment
from tightrope.recipes import Recipe, described, usual_training
from tightrope.region import Region
from tightrope.spec import Spec
from tightrope.targets import ModelFacts, make_model
from tightrope.train import METHODS, Method, Training, train
from tightrope.train.checkpoint import derive_seed, forked_rng
from tightrope.train.evaluate import HeldOut
from tightrope.train.loop import check_settings, warn_of_schedules
from tightrope.train.options import explain
from tightrope.train.schedules import last
from tightrope.verify import (
    CERTIFICATION_ATTACK,
    LATENT_ATTACK,
    Certification,
    LatentRobustness,
    Radii,
    certified_radii,
)
from tightrope.verify import certify as judge
from tightrope.verify import latent_robustness as attack_inside
from tightrope.verify.milp import Milp
from tightrope.verify.pipeline import CHUNK
from tightrope.verify.radius import TIME_LIMIT
from tightrope.verify.verifiers import find_verifier

_RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        path: the run folder.
        model: the trained network, in evaluation mode.
    """

    path: Path
    model: nn.Module

    def metrics(self) -> list[dict[str, Any]]:
        """One record per epoch.

        Raises:
            InputError: if the file of metrics is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = read_lines(path)
        if not lines:
            raise InputError(f"{path} is empty; restore it")
        return [check_line(_RECORD, line, path, number) for number, line in enumerate(lines, start=1)]


@overload
def bounds(
    model: nn.Module, x: Float[Tensor, "batch *shape"], region: Region, engine: Engine | None = None
) -> Bounds: ...


@overload
def bounds(
    model: nn.Module, x: Float[Tensor, "batch *shape"], region: Region, engine: Estimator
) -> Estimate: ...


def bounds(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    region: Region,
    engine: Estimator | None = None,
) -> Estimate:
    """Bounds of the logits over a region around each input.

    Args:
        model: any network that `trace` takes, in evaluation mode.
        x: inputs in the region's domain.
        region: where each input may move, for example `Box(eps=0.3)`.
        engine: how to bound; intervals if not said.

    Returns:
        `Bounds`, with `lower` and `upper` of shape (batch, classes); an `Estimate`, which proves nothing, by
        what only estimates: `tightrope.engines.projected()`.

    Raises:
        InputError: if an input leaves the domain, or the network or its shape does not fit.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
        >>> found = tr.bounds(net, torch.tensor([[0.5, 0.5]]), tr.Box(eps=0.1))
        >>> [[round(v, 3) for v in side[0].tolist()] for side in (found.lower, found.upper)]
        [[-0.2, 0.4], [0.2, 0.6]]
    """
    _check_inputs(model, x, region, engine)
    graph = trace(model, x.shape[1:])
    return _bounds(engine, Problem(graph, x, region, Spec.logits(len(x), graph.classes, x)))


def margins(
    model: nn.Module,
    x: Float[Tensor, "batch *shape"],
    y: Integer[Tensor, "batch"],
    region: Region,
    engine: Engine | None = None,
) -> Float[Tensor, "batch classes"]:
    """Lower bounds of `f_y - f_t` over a region, for every class t; differentiable. Positive is safe.

    Args:
        model: any network that `trace` takes, in evaluation mode.
        x: inputs in the region's domain.
        y: labels.
        region: where each input may move.
        engine: how to bound; intervals if not said.

    Raises:
        InputError: if an input leaves the domain, a label is out of range, shapes do not fit, or the engine
            only estimates.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.9, 0.1], [0.5, 0.6]]), torch.tensor([0, 1])
        >>> margins = tr.margins(net, x, y, tr.Box(eps=0.1))  # the label's own column is 0
        >>> (margins.amin(1) >= 0).tolist()
        [True, False]
    """
    _check_inputs(model, x, region, engine)
    _check_kind("the labels", y, Tensor, "torch.tensor([3, 7])")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(
            f"labels must be {len(x)} class numbers, one per input, got {y.dtype} of shape {tuple(y.shape)}"
        )
    graph = trace(model, x.shape[1:])
    found = _bounds(engine, Problem(graph, x, region, Spec.margins(y, graph.classes, x)))
    return sound(found, repr(engine)).lower


def _bounds(engine: Estimator | None, problem: Problem) -> Estimate:
    """Those of intervals if no engine is named, or where there is not one example."""
    return (engine if engine and len(problem.x) else Interval())(problem)


def _check_kind(what: str, value: object, kind: type, usual: str) -> None:
    """Refuse what is no `kind` of thing, such as a function that should have been called."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(f"{what} must be {article} {kind.__name__}, for example {usual}; got {value!r:.100}")


def _check_inputs(model: nn.Module, x: Tensor, region: Region, engine: Estimator | None) -> None:
    _check_kind("the model", model, nn.Module, "torch.nn.Sequential(...)")
    _check_kind("the region", region, Region, "tightrope.Box(eps=0.3)")
    made = callable(engine) and not isinstance(engine, type)
    ours = inspect.isfunction(engine) and engine.__module__.startswith("tightrope.")
    if engine is not None and (ours or not made):
        raise InputError(
            f"the engine must be made by a call, such as tightrope.engines.crown(); got {engine!r}"
        )
    _check_kind("the inputs", x, Tensor, "torch.rand(1, 28, 28)")
    like = next(model.parameters(), torch.empty(0))
    if x.ndim == 0 or (x.dtype, x.device) != (like.dtype, like.device):
        raise InputError(
            f"the network takes batches of {like.dtype} on {like.device}, got {x.dtype} on {x.device}, "
            f"shape {tuple(x.shape)}: convert the inputs"
        )
    if not bool(torch.isfinite(x).all()):
        raise InputError("the inputs hold NaN or Inf")
    if region.domain is None or not len(x):
        return
    low, high = region.domain
    if not low <= float(x.min()) <= float(x.max()) <= high:
        raise InputError(
            f"inputs must lie in [{low:g}, {high:g}], got {float(x.min()):.4g} to {float(x.max()):.4g}; "
            "scale them, and normalise inside the network (or give the region another domain)"
        )


def fit(
    model: nn.Module,
    train_set: Any,
    method: Method,
    *,
    out: Path | str,
    seed: int = 0,
    test_eps: float | None = None,
    norm: str = "inf",
    held_out: int | None = None,
    augment: Augment | None = None,
    device: str = "auto",
    resume: bool = False,
    **training: Any,
) -> Run:
    """Train a network with a method, on any map-style dataset of `(x, y)`.

    Args:
        model: any network that `trace` takes; it is trained in place.
        train_set: images in [0, 1] and labels: two tensors, any map-style dataset, or a `DataLoader` of one,
            which is read for its examples (batches are of `batch` examples).
        method: for example `tightrope.methods.ibp(eps=0.3)`.
        out: the run folder; it gets metrics, checkpoints and weights.
        seed: one seed, one result on one machine.
        test_eps: radius of the certified accuracy in the metrics; the training eps if not said.
        norm: in which inputs move by at most eps: "inf", "2" or "1".
        held_out: examples set aside for the metrics; 1,000, or a tenth of a small data set, if not said.
        augment: random changes of training images.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        resume: go on from the checkpoint in `out`.
        training: fields of `Training`: epochs, batch, optimiser, lr, weight_decay, clip ...; where they
            are not said, what `tightrope train` takes for the method.

    Returns:
        The run: its folder, the trained network in evaluation mode, and its `metrics()`.

    Raises:
        InputError: if something given cannot be used.
        DivergedError: if a loss or gradient turns NaN or infinite.

    Example:
        >>> import tempfile, torch, tightrope as tr
        >>> x, y = torch.rand(200, 1, 4, 4), torch.arange(200) % 3
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = tr.fit(net, (x, y), tr.methods.ibp(eps=0.05), epochs=2, out=folder)
        ...     [record["epoch"] for record in run.metrics()]
        [1, 2]
    """
    _check_kind("the model", model, nn.Module, "torch.nn.Sequential(...)")
    _check_kind("the method", method, Method, "tightrope.methods.ibp(eps=0.3)")
    if augment is not None:
        _check_kind("augment", augment, Augment, "tightrope.data.Augment(flip=True)")
    if not isinstance(out, str):
        _check_kind("out", out, Path, "'runs/a'")
    given = {
        "seed": seed,
        "test_eps": test_eps,
        "norm": norm,
        "held_out": held_out,
        **described(method),
        "training": usual_training(method.name, training),
        "augment": vars(augment) if augment else {},
    }
    try:
        recipe = Recipe.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        known = {key: key for key in (*given, *Training.model_fields)}
        problems = explain(error, "what fit was called with", known).replace(" training.", " ")
        unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
        hint = f"\ntraining takes {', '.join(Training.model_fields)}" if unknown else ""
        raise RecipeError(problems + hint) from None
    source = _source(train_set, find_device(device))
    if isinstance(train_set, DataLoader):
        theirs = getattr(train_set.batch_sampler, "batch_size", None)  # None where it makes no batches
        if theirs not in (None, recipe.training.batch):
            warn(
                f"the loader is read for its examples: batches are of batch={recipe.training.batch}, not of "
                f"{theirs}",
            )
    return run_recipe(recipe, method.over(recipe.norm), model, source, out=Path(out), resume=resume)


@torch.inference_mode(False)
@torch.enable_grad()
def run_recipe(
    recipe: Recipe,
    method: Method,
    model: nn.Module,
    source: Source,
    *,
    out: Path,
    resume: bool = False,
    watch: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Run:
    """Train a network as a recipe says, in the run folder `out`; `watch` as for `train`.

    Raises:
        InputError: if the recipe cannot be trained; if the folder already holds a run and `resume` is not
            asked for, or another process trains in it. Nothing is written then.
        IdentityError: if the folder's checkpoint belongs to another run.
    """
    recipe = resolve(recipe, method, source)
    graph, index, held_out = prepare(recipe, method, model, source)
    warn_of_settings(recipe, method)
    settings = recipe.model_dump(mode="json", exclude={"training": {"checkpoint_seconds"}})
    identity = flatten(settings) | {
        "data identity": source.identity(),
        "network structure": graph.structure(),
    }
    if isinstance(source, LoaderSource):  # whose identity knows 16 examples; all labels are read anyway
        identity["labels"] = fingerprint({"y": source.labels()})
    taken = FileError(f"another process is training in {out}; wait for it, or choose another --out")
    with locked(out / ".lock", taken):
        begun = _holds_run(out, resume)
        if not begun or not (out / "model.json").exists():
            write_atomically(out / "model.json", to_json(_describe(recipe, graph), indent=2) + "\n")
        if not begun:
            made = environment(held_out.x.device, recipe.seed) | {"parameters": _count(model)}
            write_atomically(out / "environment.json", to_json(made, indent=2) + "\n")
            write_atomically(out / "recipe.toml", recipe.to_toml())
        train(
            graph,
            source,
            index,
            held_out,
            method,
            recipe.training,
            out=out,
            seed=recipe.seed,
            test_eps=recipe.test_eps or 0.0,
            identity=identity,
            augment=Augment(**recipe.augment.model_dump()),
            resume=resume,
            watch=watch,
        )
    return Run(out, model.eval())


def _holds_run(out: Path, resume: bool) -> bool:
    """Whether a folder holds a run that has begun; an InputError if it must not be touched."""
    started = (out / "checkpoint" / "last.safetensors").exists()
    if started and not resume:
        raise InputError(
            f"{out} already holds a run: resume it (--resume, in Python resume=True), or choose another "
            "folder, --out"
        )
    if not started and (out / "model.safetensors").exists():
        raise FileError(f"{out} holds trained weights but no checkpoint to resume: choose another folder")
    return started


def make_network(recipe: Recipe, dataset: DataSet) -> nn.Module:
    """The untrained network that a recipe names, for a data set; its weights follow from the seed.

    Raises:
        InputError: if there is no such network, or it does not fit the data.
    """
    assert recipe.model is not None
    torch.manual_seed(derive_seed(recipe.seed, "network", 0))
    if ":" in recipe.model:
        return make_model(recipe.model)
    normalise = recipe.normalise.model_dump() if recipe.normalise else {}
    return build(recipe.model, dataset.train.shape, dataset.classes, **normalise)


def resolve(recipe: Recipe, method: Method, source: Source) -> Recipe:
    """The recipe with what its method and its data decide, where it does not say: test eps, held_out."""
    recipe = recipe.with_test_eps(method)
    if "held_out" in recipe.model_fields_set:
        return recipe
    return recipe.model_copy(update={"held_out": min(recipe.held_out, max(1, len(source) // 10))})


def prepare(
    recipe: Recipe, method: Method, model: nn.Module, source: Source
) -> tuple[Graph, Tensor, HeldOut]:
    """The traced network on the source's device, the examples to train on, and the held-out ones.

    Raises:
        InputError: if the network does not fit the data, has nothing to train, is not in float32, does
            something else in training mode, or cannot be trained with these settings.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the network has no parameters to train (all are frozen, or there are none)")
    others = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if others:
        raise InputError(
            f"networks are trained in float32, this one has parameters of {', '.join(sorted(others))}: "
            "give model.float()"
        )
    Augment(**recipe.augment.model_dump()).check(source.shape)
    index, aside = hold_out(source.labels(), recipe.held_out, recipe.seed)
    with forked_rng(next(model.parameters()).device):
        torch.manual_seed(derive_seed(recipe.seed, "held out", 0))
        chunks = list(source.batches(aside.split(1000)))
    held_out = HeldOut(torch.cat([x for x, _, _ in chunks]), torch.cat([y for _, y, _ in chunks]))
    graph = _trace_for(source, model, held_out.x.device)
    check_training_mode(model, graph.input_shape)
    check_settings(graph, method, recipe.training, len(index))
    return graph, index, held_out


def _check_question(
    region: Region, attack: Pgd | None, out: Path | str | None, resume: bool, name: str | None
) -> None:
    _check_kind("the region", region, Region, "tightrope.Box(eps=0.3)")
    if name is not None:
        _check_kind("name", name, str, "'mnist'")
    if attack is not None:
        _check_kind("the attack", attack, Pgd, "tightrope.attacks.Pgd(steps=40, step=0.1)")
    if resume and out is None:
        raise InputError("there is nothing to resume without a file: say which one (out)")
    if region.norm == "inf":
        warn_of_wide(float(torch.as_tensor(region.eps).max()))


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a network that is only to be looked at.

    Raises:
        InputError: if it is none, or cannot be copied.
    """
    _check_kind("the model", model, nn.Module, "torch.nn.Sequential(...)")
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise InputError(
            f"the network cannot be copied ({str(error).splitlines()[0]}): weights that a forward hook "
            "computes cannot; use torch.nn.utils.parametrizations (weight_norm, spectral_norm) instead"
        ) from error


def _source(data: Any, device: torch.device) -> Source:
    """The source that fits `data`; an InputError if it is one, and gives batches on another device."""
    source = as_source(data, device)
    theirs = getattr(source, "device", None)
    if isinstance(theirs, torch.device) and theirs.type != device.type:  # one of the user's own need not say
        raise InputError(
            f"this source gives batches on {theirs}, the network is to be on {device}: make the source with "
            f'as_source(data, "{device}"), or say device="{theirs}"'
        )
    return source


def _trace_for(source: Source, model: nn.Module, device: torch.device, first: int | None = None) -> Graph:
    """The network, traced; an InputError if it has no output for a label of the (first) examples.

    To read them all may take long where they are no tensors.
    """
    graph = trace(model.to(device), source.shape)
    if first is None:
        labels = source.labels()
    else:
        few = torch.arange(min(whole(first, "the number of examples", 1), len(source)))
        labels = torch.cat([y for _, y, _ in source.batches(few.split(CHUNK))])
    highest = int(labels.max())
    if highest >= graph.classes:
        raise InputError(f"the network has {graph.classes} outputs, but the data has the label {highest}")
    return graph


@torch.inference_mode(False)  # attacks and optimised slopes need gradients
def certify(
    model: nn.Module,
    test_set: Any,
    region: Region,
    *,
    verifier: str = "cascade",
    attack: Pgd | None = CERTIFICATION_ATTACK,
    first: int | None = None,
    time_limit: float = 60.0,
    out: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    jobs: int = 1,
    ray: str | None = None,
    certificates: bool = False,
    name: str | None = None,
    target: str | None = None,
    weights: Path | None = None,
) -> Certification:
    """Judge every example of a data set: robust, falsified, undecided, or misclassified.

    Args:
        model: any network that `trace` takes; a float64 copy in evaluation mode is judged.
        test_set: images in [0, 1] and labels: two tensors, any map-style dataset, or a `DataLoader` of one;
            images are read as float32, to which others are rounded.
        region: where each input may move, for example `Box(eps=0.3)`.
        verifier: a name in `tightrope.verify.VERIFIERS`.
        attack: what to look for witnesses with; None looks for none.
        first: judge only the first so many examples.
        time_limit: seconds that each example may take in each stage of the verifier, on average.
        out: file to append verdicts to (JSON lines).
        resume: go on from that file.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        seed: of the attack's random starts.
        jobs: processes, each of one thread, on the CPU.
        ray: address of a Ray cluster, HOST:PORT, "auto" or "local", each of whose processors is a worker; see
            `tightrope.parallel.Workers`.
        certificates: store what `recheck` needs to repeat the proofs, in a folder beside `out`.
        name: what the data set is called, for whoever reads the file.
        target: where the network is, for `recheck`: what `tightrope certify` takes.
        weights: its weights, if it is a factory.

    Returns:
        The verdicts, to iterate over, with a `summary()`.

    Raises:
        InputError: if something given cannot be used.
        SoundnessViolation: if an example is both certified and attacked.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))  # the larger entry wins
        >>> images, labels = torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.2, 0.3]]), torch.tensor([0, 1, 0])
        >>> result = tr.certify(net, (images, labels), tr.Box(eps=0.1))
        >>> [verdict.status for verdict in result]
        ['robust', 'falsified', 'misclassified']
    """
    _check_question(region, attack, out, resume, name)
    seed = whole(seed, "the seed", 0, 2**32 - 1)
    workers = Workers(jobs, ray)
    where = device_for(workers, device, verifier)
    source = _source(test_set, where)
    return judge(
        _trace_for(source, _copy(model), where, first),
        source,
        region,
        verifier=verifier,
        attack=attack,
        first=first,
        time_limit=time_limit,
        out=None if out is None else Path(out),
        resume=resume,
        seed=seed,
        workers=workers,
        certificates=certificates,
        about={
            "data": name,
            "environment": environment(where, seed),
            **({"target": target, "weights": weights and str(weights)} if target else {}),
        },
    )


@torch.inference_mode(False)
def radius(
    model: nn.Module,
    test_set: Any,
    region: Region,
    *,
    tolerance: float = 1e-3,
    verifier: str = "linear",
    first: int | None = None,
    batch: int = CHUNK,
    time_limit: float = TIME_LIMIT,
    out: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    jobs: int = 1,
    ray: str | None = None,
    name: str | None = None,
) -> Radii:
    """The certified radius of every example of a data set: the largest eps that the verifier proves.

    Args:
        model: any network that `trace` takes; a float64 copy in evaluation mode is judged.
        test_set: images in [0, 1] and labels: two tensors, any map-style dataset, or a `DataLoader` of one;
            images are read as float32, to which others are rounded.
        region: the largest region looked at, for example `Box(eps=0.6)`.
        tolerance: a radius is at most this much below an eps at which the verifier fails, in pixel units.
        verifier: a name in `tightrope.verify.VERIFIERS`.
        first: only the first so many examples.
        batch: examples per batch, and between two writes.
        time_limit: seconds that each example may take in each stage at each eps, on average.
        out: file to append radii to (JSON lines).
        resume: go on from that file.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        jobs: processes, each of one thread, on the CPU.
        ray: address of a Ray cluster, HOST:PORT, "auto" or "local", each of whose processors is a worker; see
            `tightrope.parallel.Workers`.
        name: what the data set is called, for whoever reads the file.

    Returns:
        The radii, to iterate over, with a `summary()` and the curve `certified_accuracy(eps)`.

    Raises:
        InputError: if something given cannot be used.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))  # the larger entry wins
        >>> images, labels = torch.tensor([[0.9, 0.1], [0.5, 0.6]]), torch.tensor([0, 1])
        >>> [round(found.radius, 2) for found in tr.radius(net, (images, labels), tr.Box(eps=0.5))]
        [0.4, 0.05]
    """
    _check_question(region, None, out, resume, name)
    workers = Workers(jobs, ray)
    where = device_for(workers, device, verifier)
    source = _source(test_set, where)
    return certified_radii(
        _trace_for(source, _copy(model), where, first),
        source,
        region,
        tolerance=tolerance,
        verifier=verifier,
        first=first,
        batch=batch,
        time_limit=time_limit,
        out=None if out is None else Path(out),
        resume=resume,
        workers=workers,
        about={"data": name, "environment": environment(where)},
    )


@torch.inference_mode(False)
def latent_robustness(
    model: nn.Module,
    test_set: Any,
    region: Region,
    node: str,
    *,
    attack: Pgd = LATENT_ATTACK,
    first: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> LatentRobustness:
    """How many examples withstand an attack inside the latent region behind a layer: a statistic, no proof.

    Args:
        model: any network that `trace` takes; a float32 copy in evaluation mode is attacked.
        test_set: images in [0, 1] and labels: two tensors, any map-style dataset, or a `DataLoader` of one;
            images are read as float32, to which others are rounded.
        region: where each input may move, for example `Box(eps=0.1)`.
        node: name of an activation, or "input".
        attack: the attack; its step is counted in noise, which lies in [-1, 1].
        first: only the first so many examples.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...
        seed: of the attack's random starts.

    Returns:
        Counts, with a `summary()`.

    Raises:
        InputError: if something given cannot be used.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> images, labels = torch.rand(10, 2), torch.tensor([0, 1] * 5)
        >>> found = tr.latent_robustness(net, (images, labels), tr.Box(eps=0.1), "1")
        >>> found.withstood <= found.clean_correct <= found.examples == 10
        True
    """
    where = find_device(device)
    source = _source(test_set, where)
    graph = _trace_for(source, _copy(model), where, first)
    return attack_inside(graph, source, region, node, attack=attack, first=first, seed=seed)


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is a GPU if there is one.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.zeros(1, device=name)
        made.item()  # the "meta" device holds no numbers
        return made.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None


def device_for(workers: Workers, name: str, verifier: str = "none") -> torch.device:
    """The device, where these workers and this verifier may use it.

    Raises:
        InputError: if they may not, or there is no such device or verifier.
    """
    solves = any(isinstance(stage, Milp) for stage in find_verifier(verifier))
    device = torch.device("cpu") if name == "auto" and (workers.several or solves) else find_device(name)
    if workers.several and device.type != "cpu":
        raise InputError(
            f"several workers share processors, not {device}: take --device cpu or leave out --jobs and --ray"
        )
    if solves and device.type != "cpu":
        raise InputError(
            f"the verifier {verifier} solves its programs on the CPU, not on {device}: take --device cpu or "
            "another verifier"
        )
    return device


def warn_of_settings(recipe: Recipe, method: Method) -> None:
    """Warn of radii and schedules that are probably not meant so."""
    warn_of_schedules(method, recipe.training)
    trained = last(method.eps)
    if method.norm == "inf":
        warn_of_wide(trained)
    if trained == 0 and method.name in METHODS and method.name != "standard":
        warn(f"{method.name} at eps 0 trains without any perturbation: say how far, --eps")
    if any(loss.certified for loss in method.losses) and (recipe.test_eps or 0.0) > trained:
        warn(
            f"the network is trained at eps {trained:.4g} but is to be certified at {recipe.test_eps:.4g}: "
            "train at the test eps or above",
        )


def warn_of_wide(eps: float) -> None:
    """Warn of an l_inf radius that is probably meant in other units."""
    if eps > 1:
        warn(
            f"eps {eps:g} is wider than the range of a pixel, [0, 1]: write {eps:g}/255 for grey levels",
        )


def _describe(recipe: Recipe, graph: Graph) -> dict[str, Any]:
    normalise = recipe.normalise.model_dump() if recipe.normalise else {}
    facts = ModelFacts(
        name=recipe.model, input_shape=tuple(graph.input_shape), classes=graph.classes, **normalise
    )
    return facts.model_dump(mode="json")


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat

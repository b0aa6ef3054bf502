"""Training methods: each a short composition of terms, weights, radii and schedules.

A method's options are its function's parameters; recipes, the command line and their checks are
derived from the signature. To add a method: one function here, one row in the tests, one recipe.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.attacks import fgsm as one_step
from tightrope.bounds import Engine, Interval, Linear
from tightrope.bounds.projected import Projected
from tightrope.bounds.pullback import Scheme
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.region import Box
from tightrope.train import regularisers, terms
from tightrope.train.batch import Margins, Search, State, Term
from tightrope.train.combine import Bisector, Total
from tightrope.train.initialise import ibp_initialisation
from tightrope.train.objective import Combiner, Loss, Radii
from tightrope.train.schedules import (
    Course,
    NotNegative,
    Number,
    NumberOrRamp,
    Positive,
    Ramp,
    Real,
    Share,
    Steps,
    Whole,
    at,
    last,
)
from tightrope.train.stages import WHOLE, Layerwise, Stage

P = ParamSpec("P")
R = TypeVar("R", "Method", "Modifier")


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation that a robust loss rests on.

    Args:
        scheme: how the activations are relaxed.
        presence: how much of a regulariser of this relaxation counts: 1 is all of it.
    """

    scheme: Scheme
    presence: Ramp


@dataclass(frozen=True)
class Method:
    """What a network is trained for.

    Args:
        name: its published name.
        eps: radius of the region in pixel units, a number or a schedule.
        losses: what is summed, each times its weight.
        initialise: what is done to the network before the first step.
        engine: what certifies the held-out examples in the metrics.
        relaxation: the linear relaxation that its robust loss rests on, if it does.
        combiner: how its losses become one gradient.
        radii: the radius of each example, if not `eps` for all.
        layerwise: how it goes through the layers, if it trains them one after another; its schedules are
            then those of a stage.
        search: how the metrics of such a method attack the region of a stage.
        options: what its function was called with; part of a run's identity.
        modifiers: what was added by `method | modifier`: each one's options by its name.
    """

    name: str
    eps: Number
    losses: tuple[Loss, ...]
    initialise: Callable[[Graph], None] | None = None
    engine: Engine = field(default_factory=Interval)
    relaxation: Relaxation | None = None
    combiner: Combiner = field(default_factory=Total)
    radii: Radii | None = None
    layerwise: Layerwise | None = None
    search: Search | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    modifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __or__(self, modifier: Modifier) -> Method:
        """The method with something more: `ibp(eps=0.3) | tightness_r()`.

        Raises:
            InputError: if it already has this modifier, or the modifier does not apply to it.
        """
        if modifier.name in self.modifiers:
            raise InputError(f"{self.name} already has the modifier {modifier.name}")
        modifiers = {**self.modifiers, modifier.name: modifier.options}
        return replace(modifier.change(self), modifiers=modifiers)

    def begin(self, graph: Graph, examples: int) -> State:
        """What it remembers, at the beginning of a run on this many examples."""
        return self.combiner.begin(graph) | ({} if self.radii is None else self.radii.begin(examples))

    def stages(self, graph: Graph) -> list[Stage]:
        """The parts of a run on this network."""
        return [WHOLE] if self.layerwise is None else self.layerwise.of(graph)

    def region(self, stage: Stage, progress: float, index: Int[Tensor, "batch"], state: State) -> Box:
        """Where the examples with these numbers may move when this share of a stage is done."""
        eps = stage.eps * at(self.eps, progress)
        return Box(eps if self.radii is None else self.radii(eps, index, state))

    def __post_init__(self) -> None:
        certified = [loss for loss in self.losses if loss.certified]
        if certified and not any(last(loss.weight) > 0 for loss in certified):
            raise InputError(
                f"{self.name} is a certified method, but its robust term ends with weight 0: "
                "it would train nothing robust; lower kappa below 1"
            )
        if certified and last(self.eps) <= 0:
            raise InputError(f"{self.name} needs a training eps above 0, got {last(self.eps)}")
        weights = {f"the weight of its {loss.name} term": loss.weight for loss in self.losses}
        for what, number in {"eps": self.eps, **weights}.items():
            if not all(0 <= at(number, moment) < math.inf for moment in (0.0, 1.0)):
                raise InputError(f"{self.name}: {what} must be finite and not negative, got {number}")


@dataclass(frozen=True)
class Modifier:
    """What can be added to many methods.

    Args:
        name: its published name.
        change: the method with it.
        options: what its function was called with; part of a run's identity.
    """

    name: str
    change: Callable[[Method], Method]
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Callable[..., Method]] = {}
MODIFIERS: dict[str, Callable[..., Modifier]] = {}


def published(registry: dict[str, Callable[..., R]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a method or modifier under its name, and note the options it was made with."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments.items()
            options = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in given}
            return replace(function(*args, **kwargs), options=options)

        registry[function.__name__.replace("_", "-")] = make
        return make

    return register


@published(METHODS)
def standard() -> Method:
    """Natural training: the cross-entropy of the clean inputs."""
    return Method("standard", 0.0, (Loss("natural", 1.0, terms.natural),))


@published(METHODS)
def fgsm(eps: Number, step: Real = 1.25) -> Method:
    """Adversarial training with one gradient step from a random start (Wong et al. 2020).

    Args:
        eps: radius, in pixel units.
        step: length of the step, as a share of eps.
    """
    return Method("fgsm", eps, (Loss("adversarial", 1.0, terms.adversarial(one_step(step))),))


@published(METHODS)
def pgd(eps: Number, steps: Whole = 7, step: Real = 0.3) -> Method:
    """Adversarial training with projected gradient ascent (Madry et al. 2018).

    Args:
        eps: radius, in pixel units.
        steps: gradient steps.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("pgd", eps, (Loss("adversarial", 1.0, terms.adversarial(attack)),))


@published(METHODS)
def trades(eps: Number, beta: NotNegative = 6.0, steps: Whole = 10, step: Positive = 0.25) -> Method:
    """TRADES (Zhang et al. 2019): `CE(p(x)) + beta KL(p(x) || p(x'))`, x' where the divergence is large.

    Args:
        eps: radius, in pixel units.
        beta: weight of the divergence, 1 / lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, loss="divergence", keep_best=False)
    losses = (Loss("natural", 1.0, terms.natural), Loss("divergence", beta, terms.divergence(attack)))
    return Method("trades", eps, losses)


@published(METHODS)
def mart(eps: Number, lam: NotNegative = 5.0, steps: Whole = 10, step: Positive = 0.25) -> Method:
    """MART (Wang et al. 2020): adversarial training that looks harder at what is misclassified.

    Args:
        eps: radius, in pixel units.
        lam: weight of the divergence, lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("mart", eps, (Loss("adversarial", 1.0, terms.mart(attack, lam)),))


@published(METHODS)
def relu_stability(
    eps: Number, weight: NotNegative = 1e-5, l1: NotNegative = 1e-5, steps: Whole = 7, step: Positive = 0.3
) -> Method:
    """Adversarial training for networks that are quick to verify (Xiao et al. 2019).

    `CE(p(x')) - weight sum tanh(1 + l u) + l1 sum |W|`.

    Args:
        eps: radius, in pixel units.
        weight: of the stability of all ReLUs.
        l1: weight of the size of all weights.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    losses = (
        Loss("adversarial", 1.0, terms.adversarial(attack)),
        Loss("stability", weight, regularisers.xiao_stability),
        Loss("l1", l1, regularisers.l1),
    )
    return Method("relu-stability", eps, losses)


@published(METHODS)
def ibp(eps: Number, kappa: NumberOrRamp = 0.5, ramp: Course = Course(begin=0.03, finish=0.2)) -> Method:
    """Interval bound propagation (Gowal et al. 2018): `kappa CE(f(x)) + (1 - kappa) CE(-m_IBP)`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        ramp: when eps and kappa move; the default is the MNIST schedule, epochs 3 to 20 of 100.
    """
    eps, ramp = _on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    losses = (Loss("natural", kappa, terms.natural), _robust(_rest(kappa), terms.bounded(Interval())))
    return Method("ibp", eps, losses)


@published(METHODS)
def shi_ibp(
    eps: Number,
    regularise: Real = 0.5,
    ramp: Course = Course(shape="smooth", begin=1 / 70, finish=21 / 70),
) -> Method:
    """Improved IBP (Shi et al. 2021): IBP initialisation, BatchNorm, and two regularisers in the ramp.

    `CE(-m_IBP) + lambda (1 - eps_t / eps) (L_tight + L_relu)`. Use a network with BatchNorm after
    each layer (the models named `...-bn`).

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        regularise: weight lambda of the regularisers at the start; it falls to 0 as eps rises.
        ramp: when eps rises; the default is epochs 1 to 21 of 70.
    """
    eps, ramp = _on(ramp, eps)
    losses = (_robust(1.0, terms.bounded(Interval())), *shi_regularisers(ramp, regularise))
    return Method("shi-ibp", eps, losses, initialise=ibp_initialisation)


@published(METHODS)
def crown_ibp(
    eps: Number,
    kappa: NumberOrRamp = 0.5,
    beta: NumberOrRamp = 0.0,
    fusion: bool = False,
    ramp: Course = Course(begin=10 / 200, finish=60 / 200),
) -> Method:
    """CROWN-IBP (Zhang et al. 2020): `kappa CE(f(x)) + (1 - kappa) CE(-m)`, CROWN's bounds fading to IBP's.

    `m = beta m_CROWN-IBP + (1 - beta) m_IBP`, both over the same interval boxes.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        beta: share of the CROWN-IBP bounds at the end of the ramp (1 at its beginning), or a schedule.
        fusion: whether all classes share one backward row: about a quarter of the cost.
        ramp: when eps, kappa and beta move; the default is epochs 10 to 60 of 200.
    """
    eps, ramp = _on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    beta = beta if isinstance(beta, Ramp) else ramp.between(1.0, beta)
    if not all(0 <= share <= 1 for share in (beta.start, beta.end)):
        raise InputError(f"crown-ibp: beta is a share and must lie in [0, 1], got {beta}")
    robust = _robust(_rest(kappa), terms.crown_ibp(beta))
    if fusion:  # there are no margins of single classes but the interval ones
        robust = replace(robust, term=terms.fused_crown_ibp(beta), margins=terms.bounded(Interval()))
    losses = (Loss("natural", kappa, terms.natural), robust)
    return Method("crown-ibp", eps, losses, relaxation=Relaxation(terms.CROWN_IBP, beta))


@published(METHODS)
def wong_kolter(
    eps: Number,
    projections: Annotated[Whole, Field(ge=0)] = 50,
    ramp: Course = Course(begin=0.0, finish=0.25),
) -> Method:
    """Wong and Kolter 2018: `CE(-m)` with the dual (Fast-Lin) bound of the margins.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        projections: random directions that stand for the columns of a layer with more of them (Wong et
            al. 2018): an estimate, for training alone. 0 bounds every neuron exactly.
        ramp: when eps rises, and a regulariser of the relaxation comes in; the default is the first
            20 epochs of 80.
    """
    eps, ramp = _on(ramp, eps)
    boxes = Projected(projections) if projections else Linear("parallel", "linear", sides="none")
    scheme = Scheme(boxes, "parallel")
    losses = (_robust(1.0, terms.relaxed(scheme)),)
    relaxation = Relaxation(scheme, ramp.between(0.0, 1.0))
    exact = Linear("parallel", "linear", sides="lower")
    return Method("wong-kolter", eps, losses, engine=exact, relaxation=relaxation)


@published(METHODS)
def advibp(
    eps: Number,
    combiner: Literal["bisector", "total"] = "bisector",
    threshold: NumberOrRamp = 0.02,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    clean: Share = 0.01,
    ramp: Course = Course(begin=0.05, finish=0.3),
) -> Method:
    """AdvIBP (Fan and Li 2021): an adversarial and an IBP loss, together (advibp.txt, algorithms 1 and 2).

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        combiner: "bisector" weighs the two gradients by their moments; "total" adds them up (the paper's
            baseline).
        threshold: FOSC up to which the adversarial loss has priority where the gradients disagree, at the
            end of the ramp; it falls to 0 over the next 40 % of what is left. Or a schedule.
        beta1: decay of the moving averages of the gradients.
        beta2: decay of the moving averages of their lengths.
        clean: share of the run until which there is the natural loss alone; from there until the ramp begins
            there is the adversarial loss alone, at a radius of its own that rises to eps.
        ramp: when eps rises.
    """
    robust = terms.bounded(Interval())
    return _joint("advibp", eps, robust, combiner, threshold, beta1, beta2, clean, ramp)


@published(METHODS)
def advcrown_ibp(
    eps: Number,
    combiner: Literal["bisector", "total"] = "bisector",
    threshold: NumberOrRamp = 0.02,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    clean: Share = 0.01,
    ramp: Course = Course(begin=0.05, finish=0.3),
) -> Method:
    """AdvCROWN-IBP (Fan and Li 2021): AdvIBP with CROWN-IBP's bounds fading to IBP's over the ramp.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        combiner: "bisector" weighs the two gradients by their moments; "total" adds them up.
        threshold: FOSC up to which the adversarial loss has priority where the gradients disagree, at the
            end of the ramp; it falls to 0 over the next 40 % of what is left. Or a schedule.
        beta1: decay of the moving averages of the gradients.
        beta2: decay of the moving averages of their lengths.
        clean: share of the run until which there is the natural loss alone; from there until the ramp begins
            there is the adversarial loss alone, at a radius of its own that rises to eps.
        ramp: when eps rises, and CROWN-IBP's share falls from 1 to 0.
    """
    eps, ramp = _on(ramp, eps)
    beta = ramp.between(1.0, 0.0)
    robust = terms.crown_ibp(beta)
    method = _joint("advcrown-ibp", eps, robust, combiner, threshold, beta1, beta2, clean, ramp)
    return replace(method, relaxation=Relaxation(terms.CROWN_IBP, beta))


EXPRESSIVE = Course(shape="smooth", begin=1 / 70, finish=21 / 70)
"""When eps rises in the methods that mix bounds and attacks: epochs 1 to 21 of 70."""


@published(METHODS)
def sabr(
    eps: Number, share: Share = 0.6, steps: Whole = 8, step: Positive = 0.25, ramp: Course = EXPRESSIVE
) -> Method:
    """SABR (Müller et al. 2023): `CE(-m_IBP)` over a small box inside the region, where an attack points.

    Args:
        eps: radius of the whole region at the end of the ramp, in pixel units; or a schedule.
        share: size of the small box, as a share of eps: lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = _on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("sabr", eps, (_robust(1.0, terms.small_box(attack, share)),), initialise=ibp_initialisation)


@published(METHODS)
def cc_ibp(
    eps: Number, alpha: Share = 0.3, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """CC-IBP (De Palma et al. 2024): `CE(-(alpha m_IBP + (1 - alpha) m(x')))`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = _on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("cc-ibp", eps, (_robust(1.0, terms.between(attack, alpha)),), initialise=ibp_initialisation)


@published(METHODS)
def mtl_ibp(
    eps: Number, alpha: Share = 0.08, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """MTL-IBP (De Palma et al. 2024): `alpha L_IBP + (1 - alpha) L_adv`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = _on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    losses = (
        Loss("adversarial", 1 - alpha, terms.adversarial(attack)),
        _robust(alpha, terms.bounded(Interval())),
    )
    return Method("mtl-ibp", eps, losses, initialise=ibp_initialisation)


@published(METHODS)
def exp_ibp(
    eps: Number, alpha: Share = 0.3, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """Exp-IBP (De Palma et al. 2024): `L_IBP^alpha L_adv^(1 - alpha)`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = _on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    margins = terms.bounded(Interval())
    loss = Loss("robust", 1.0, terms.exponential(attack, alpha), margins)
    return Method("exp-ibp", eps, (loss,), initialise=ibp_initialisation)


class LatentAttack(BaseModel):
    """How points of a latent region are looked for.

    Args:
        steps: gradient steps.
        step: length of one, where noise lies between -1 and 1.
        projections: random directions that the bounds before the region are estimated from; 0 computes them
            exactly, which costs a backward pass for each open neuron.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[Whole, Field(ge=1)] = 8
    step: Positive = 0.25
    projections: Annotated[Whole, Field(ge=0)] = 50

    def search(self, predicted: bool = False) -> Search:
        """The attack and its bounds; `predicted` says that it goes by the network's own answers."""
        boxes = Projected(self.projections) if self.projections else Linear("parallel", sides="none")
        return Search(Pgd(self.steps, self.step, keep_best=False), boxes, predicted)


class Penalty(BaseModel):
    """What else is made small.

    Args:
        l1: weight of the size of all weights in training.
        stability: weight of the instability of the first activation in training.
        stability_factor: what that weight is multiplied by from stage to stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    l1: NotNegative = 1e-5
    stability: NotNegative = 0.005
    stability_factor: Positive = 1.5


@published(METHODS)
def colt(
    eps: Positive,
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """COLT (Balunovic and Vechev 2020): adversarial training in the convex region of one layer after another.

    `(1 - natural) CE(p(x')) + natural CE(p(x))`, x' in the latent region behind the frozen layers.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search()
    return _layerwise("colt", eps, natural, search, stages, penalty, partial(terms.latent, search))


@published(METHODS)
def mat(
    eps: Positive,
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """Misclassification-aware training (maar.txt, eq. 2): COLT by the network's own answers.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search(predicted=True)
    return _layerwise("mat", eps, natural, search, stages, penalty, partial(terms.latent, search))


@published(METHODS)
def maar(
    eps: Positive,
    lam: NotNegative = 6.0,
    weight: terms.Awareness = "soft",
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """Misclassification-aware adversarial regularisation (maar.txt, eq. 14): COLT and a consistent answer.

    `CE(p(x')) + lam KL(p(x) || p(x')) (1 - p_y(x))` in the place of COLT's `CE(p(x'))`.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        lam: weight lambda of the divergence.
        weight: "soft" is `1 - p_y(x)`; "hard" 1 where x is misclassified, else 0; "uniform" 1 everywhere.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search()
    term = partial(terms.consistent, search, lam, weight)
    return _layerwise("maar", eps, natural, search, stages, penalty, term)


def _layerwise(
    name: str,
    eps: float,
    natural: float,
    search: Search,
    stages: Layerwise,
    penalty: Penalty,
    term: Callable[[bool], Term],
) -> Method:
    """A loss in the region of a stage, which takes over from that in the region of the stage before."""
    mixing = Course(begin=0.0, finish=stages.mix)
    losses = (  # the stability looks furthest into the network: it comes first, and all share its bounds
        Loss(
            "stability",
            mixing.between(0.0, penalty.stability),
            regularisers.relu_stability(search.boxes, penalty.stability_factor),
        ),
        Loss("latent", mixing.between(0.0, 1 - natural), term(False)),
        Loss("latent before", mixing.between(1 - natural, 0.0), term(True)),
        Loss("natural", natural, terms.natural),
        Loss("l1", penalty.l1, regularisers.l1),
    )
    engine = Linear("adaptive", "interval", sides="lower")
    return Method(name, eps, losses, engine=engine, layerwise=stages, search=search)


def _joint(
    name: str,
    eps: float | Ramp | Steps,
    robust: Margins,
    combiner: Literal["bisector", "total"],
    threshold: float | Ramp,
    beta1: float,
    beta2: float,
    clean: float,
    ramp: Course,
) -> Method:
    """An adversarial and a robust loss, after clean and adversarial warm-up."""
    eps, ramp = _on(ramp, eps)
    if not isinstance(threshold, Ramp):
        over = ramp.finish + 0.4 * (1 - ramp.finish)
        threshold = Course(begin=ramp.finish, finish=over).between(threshold, 0.0)
    if clean > ramp.begin:
        raise InputError(
            f"{name}: clean training ({clean}) ends before the ramp of eps begins ({ramp.begin}), with "
            "adversarial training between them"
        )
    attack, warm = one_step(), Course(begin=clean, finish=ramp.begin).between(0.0, last(eps))
    first, second = Course(begin=clean, finish=clean), Course(begin=ramp.begin, finish=ramp.begin)
    losses = (
        Loss("natural", first.between(1.0, 0.0), terms.natural),
        Loss("adversarial", first.between(0.0, 1.0), terms.adversarial(attack, warm)),
        _robust(second.between(0.0, 1.0), robust),
    )
    both = Bisector(attack, threshold, beta1, beta2) if combiner == "bisector" else Total()
    return Method(name, eps, losses, combiner=both)


def shi_regularisers(ramp: Course, lam: float) -> tuple[Loss, Loss]:
    """The two regularisers of Shi et al. 2021, fading out over a ramp."""
    weight, engine = ramp.between(lam, 0.0), Interval()
    return (
        Loss("tightness", weight, regularisers.shi_tightness(engine)),
        Loss("relu-balance", weight, regularisers.shi_relu(engine)),
    )


def _robust(weight: Number, margins: Margins) -> Loss:
    """The loss of the worst case, by lower bounds of the margins."""
    return Loss("robust", weight, terms.worst_case(margins), margins)


def _on(ramp: Course, eps: float | Ramp | Steps) -> tuple[Ramp | Steps, Course]:
    """The schedule of eps, and the course that everything else in the method follows."""
    if isinstance(eps, Ramp):
        return eps, eps.course()
    return (eps if isinstance(eps, Steps) else ramp.between(0.0, eps)), ramp


def _rest(kappa: float | Ramp) -> float | Ramp:
    """`1 - kappa`, moving as kappa moves."""
    if isinstance(kappa, Ramp):
        return kappa.course().between(1 - kappa.start, 1 - kappa.end)
    return 1 - kappa

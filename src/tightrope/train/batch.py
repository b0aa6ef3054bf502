"""One training batch and what its terms share, so that no forward pass is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.bounds import Estimator, Hull, Latent, Problem
from tightrope.bounds.base import Boxes
from tightrope.bounds.hull import split_node
from tightrope.bounds.latent import NOISE, boxes_upto
from tightrope.bounds.pullback import Pullback, Scheme, pull_back
from tightrope.graph import Graph
from tightrope.region import Region
from tightrope.spec import Spec
from tightrope.train.stages import WHOLE, Stage

Term = Callable[["Batch"], Tensor]
"""A loss: `batch -> (batch,)`, one per example, or `(batch, several)`; a regulariser yields one value."""

Margins = Callable[["Batch"], Tensor]
"""Lower bounds of the margins over every class, 0 at the label's own: `batch -> (batch, classes)`."""

State = dict[str, Tensor]
"""What a method remembers from step to step; a checkpoint holds it."""

SMALLEST_EPS = 1e-6
"""Radius at which a regulariser looks at bounds while the schedule is still at 0 (Shi et al. 2021)."""


@dataclass(frozen=True)
class Worst:
    """The inputs at which a linear relaxation is smallest, one for each wrong class.

    Args:
        bound: the relaxation's value there, the lower bound of each margin.
        margins: the network's own margin there.
        entering: what enters each activation there, `(batch, classes - 1, *shape)`.
        coefficients: of what each activation yields, in the relaxation.
    """

    bound: Float[Tensor, "batch rivals"]
    margins: Float[Tensor, "batch rivals"]
    entering: dict[int, Tensor]
    coefficients: dict[int, Tensor]


@dataclass(frozen=True)
class Search:
    """How adversarial points of a latent region are looked for.

    Args:
        attack: what looks for them; its steps are counted in noise.
        boxes: how the activations before the region are bounded.
        predicted: whether the attack, and the loss at what it finds, go by the network's own answer
            instead of the label.
    """

    attack: Pgd
    boxes: Estimator
    predicted: bool = False


class Batch:
    """Inputs, labels, their region, and the passes over them, each done once, when first asked for.

    Args:
        graph: the network, in training mode.
        x: inputs in [0, 1].
        y: labels.
        region: where each input may move at this moment of the run.
        progress: share of the run, or of its present stage, that is done.
        generator: source of this step's randomness.
        index: numbers of the examples in their data set, if a method wants to know them.
        state: what the run's method remembers.
        stage: where in the network a method that trains layer by layer is at work.

    Attributes:
        weighed: weights of the examples in each loss that has taken their weighted mean, by its name.
    """

    def __init__(
        self,
        graph: Graph,
        x: Float[Tensor, "batch *shape"],
        y: Int[Tensor, "batch"],
        region: Region,
        progress: float,
        generator: torch.Generator,
        index: Int[Tensor, "batch"] | None = None,
        state: State | None = None,
        stage: Stage = WHOLE,
    ) -> None:
        self.graph, self.x, self.y, self.region = graph, x, y, region
        self.progress, self.generator = progress, generator
        self.index, self.state, self.stage = index, {} if state is None else state, stage
        self.weighed: dict[str, Tensor] = {}
        self._attacked: dict[Pgd, Tensor] = {}
        self._pulled: dict[Scheme, Pullback] = {}
        self._worst: dict[Scheme, Worst] = {}
        self._boxes: dict[Estimator, Boxes] = {}
        self._inside: dict[tuple[Search, int], Tensor] = {}
        self._moved: dict[tuple[Pgd, bool], Tensor] = {}
        self._small: dict[tuple[Pgd | None, float], Problem] = {}

    def parts(self, largest: int) -> Iterator[Batch]:
        """The batch in parts of about the same size, none larger than this, with one state and generator."""
        count, eps = -(-len(self.y) // largest), self.region.eps
        for some in torch.arange(len(self.y)).tensor_split(count):
            here = slice(int(some[0]), int(some[-1]) + 1)
            part = Batch(
                self.graph,
                self.x[here],
                self.y[here],
                self.region.with_eps(eps[here]) if isinstance(eps, Tensor) else self.region,
                self.progress,
                self.generator,
                None if self.index is None else self.index[here],
                self.state,
                self.stage,
            )
            part.still = self.still  # one radius above 0 is enough for the whole batch to move
            yield part

    @cached_property
    def evaluated(self) -> Graph:
        """The network in evaluation, at the statistics from before this batch: what attacks look at."""
        return self.graph.frozen(copied=True)

    @cached_property
    def _clean(self) -> tuple[Tensor, Graph]:
        if self.graph.has_batch_statistics():
            _ = self.evaluated  # before they move
        return self.graph.run(self.x)

    @property
    def logits(self) -> Float[Tensor, "batch classes"]:
        """Logits of the clean inputs."""
        return self._clean[0]

    @property
    def margins(self) -> Float[Tensor, "batch classes"]:
        """`f_y - f_t` of the clean inputs."""
        return self.logits.gather(1, self.y.unsqueeze(1)) - self.logits

    @property
    def fixed(self) -> Graph:
        """The network at the clean batch's BatchNorm statistics: the function that bounds are about."""
        return self._clean[1] if self.graph.has_batch_statistics() else self.graph

    @cached_property
    def still(self) -> bool:
        """Whether the region is a point, so that a robust loss is the natural one."""
        eps = self.region.eps
        return not bool(eps.any()) if isinstance(eps, Tensor) else eps == 0

    @cached_property
    def floored(self) -> Region:
        """The region, or a very small one while it is a point: a regulariser compares widths."""
        return self.region.with_eps(SMALLEST_EPS) if self.still else self.region

    @cached_property
    def problem(self) -> Problem:
        """The margins over the `floored` region, of which every bound is asked once."""
        spec = Spec.margins(self.y, self.graph.classes, self.x)
        return Problem(self.fixed, self.x, self.floored, spec, self.generator)

    @cached_property
    def rivals(self) -> Int[Tensor, "batch rivals"]:
        """The wrong classes of each example."""
        others = torch.arange(self.graph.classes - 1, device=self.y.device)
        return others + (others >= self.y.unsqueeze(1))

    @cached_property
    def _rows(self) -> Float[Tensor, "batch rivals classes"]:
        """Coefficients of the margins over the wrong classes: nothing is to be done for the label's own."""
        return self.problem.spec.rows.take_along_dim(self.rivals.unsqueeze(2), 1)

    def pulled(self, scheme: Scheme) -> Pullback:
        """The margins over the wrong classes, pulled back to the input over a linear relaxation."""
        if scheme not in self._pulled:
            self._pulled[scheme] = pull_back(self.problem, scheme, self._rows)
        return self._pulled[scheme]

    def relaxed(self, scheme: Scheme) -> Float[Tensor, "batch classes"]:
        """Lower bounds of the margins over every class, by a linear relaxation."""
        return self._of_all(self.pulled(scheme).lower)

    def _of_all(self, margins: Float[Tensor, "batch rivals"]) -> Float[Tensor, "batch classes"]:
        """Margins over every class: that over the label's own is 0."""
        return margins.new_zeros(len(margins), self.graph.classes).scatter(1, self.rivals, margins)

    def worst(self, scheme: Scheme) -> Worst:
        """Where a linear relaxation is smallest, and what the network does there."""
        if scheme not in self._worst:
            pulled = self.pulled(scheme)
            points = self.floored.minimiser(self.x, pulled.reached[0])
            logits, entering = self.fixed.entering(points.flatten(0, 1))
            self._worst[scheme] = Worst(
                bound=pulled.lower,
                margins=(self._rows * logits.unflatten(0, points.shape[:2])).sum(2),
                entering={i: z.unflatten(0, points.shape[:2]) for i, z in entering.items()},
                coefficients={i: rows for i, rows in pulled.reached.items() if i},
            )
        return self._worst[scheme]

    def attacked(self, attack: Pgd) -> Float[Tensor, "batch *shape"]:
        """The inputs after an attack on the `evaluated` network."""
        if attack not in self._attacked:
            found = attack(self.evaluated, self.x, self.y, self.region, self.generator)
            self._attacked[attack] = found
        return self._attacked[attack]

    def moved(self, attack: Pgd, fixed: bool = False) -> Float[Tensor, "batch classes"]:
        """The logits at what an attack found, in the network's present mode or of the `fixed` network.

        Beside bounds it is the `fixed` one: else BatchNorm would make two functions of the network, and its
        running statistics, half those of attacked inputs, would fit neither.
        """
        if (attack, fixed) not in self._moved:
            point = self.attacked(attack)
            self._moved[attack, fixed] = (self.fixed if fixed else self.graph).run(point)[0]
        return self._moved[attack, fixed]

    def small(self, attack: Pgd | None, share: float) -> Problem:
        """The margins over a box of `share` of the radius, in the region and near what an attack found.

        An l_inf box keeps away from the ends of the domain, which would cut it, as far as the region lets it.
        Without an attack, it lies anywhere.
        """
        if (attack, share) not in self._small:
            region, rest = self.floored, self.floored.with_eps((1 - share) * self.floored.eps)
            box = region.with_eps(share * region.eps)
            if attack is None:
                centre = rest.sample(self.x, self.generator)
            else:
                found = self.attacked(attack).detach()
                if region.norm == "inf" and region.domain is not None:
                    low, high = region.domain
                    radius = torch.as_tensor(box.radius(self.x), dtype=found.dtype, device=found.device)
                    found = found.clamp(low + radius, high - radius)
                centre = rest.project(self.x, found)
            self._small[attack, share] = Problem(self.fixed, centre, box, self.problem.spec, self.generator)
        return self._small[attack, share]

    def connected(self, problem: Problem, attack: Pgd, split: int) -> Float[Tensor, "batch classes"]:
        """Margins at the points of a node's box that an attack found, one for each wrong class."""
        hull = Hull.over(problem, split_node(problem.graph, split), self._rows)
        noise = attack(hull, hull.still, hull.labels, NOISE, self.generator)
        return self._of_all(hull.values(noise))

    def boxes(self, estimator: Estimator, node: int) -> Boxes:
        """Bounds of what enters each activation up to a node, or further if more was asked for before."""
        if estimator not in self._boxes or (node and node not in self._boxes[estimator]):
            self._boxes[estimator] = boxes_upto(self.problem, node, estimator)
        return self._boxes[estimator]

    def target(self, search: Search) -> Int[Tensor, "batch"]:
        """The labels that a search goes by."""
        return self.logits.argmax(1) if search.predicted else self.y

    def inside(self, search: Search, node: int) -> Float[Tensor, "batch classes"]:
        """The logits at a point of a node's latent region that an attack found."""
        if (search, node) not in self._inside:
            latent = Latent.over(self.fixed, self.x, self.region, node, self.boxes(search.boxes, node))
            network = latent.on(self.evaluated)
            noise = search.attack(network, latent.still, self.target(search), NOISE, self.generator)
            self._inside[search, node] = latent.run(noise)[0]
        return self._inside[search, node]

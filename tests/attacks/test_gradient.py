from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.attacks import Pgd, fgsm
from tightrope.errors import InputError
from tightrope.graph import Graph, trace
from tightrope.region import Box, L1Ball, L2Ball, Region

REGIONS = [Box, L2Ball, L1Ball]
LABELS = torch.tensor([0, 1, 2, 0])

each_region = pytest.mark.parametrize("kind", REGIONS, ids=lambda kind: kind.__name__)
each_attack = pytest.mark.parametrize(
    "attack",
    [
        Pgd(steps=3, step=0.5),
        Pgd(steps=3, step=0.5, restarts=3),
        Pgd(steps=3, step=0.5, loss="margin"),
        Pgd(steps=3, step=0.5, keep_best=False),
        Pgd(steps=3, step=0.5, restarts=2, keep_best=False),
        fgsm(),
    ],
    ids=["pgd", "restarts", "margin", "last", "last of restarts", "fgsm"],
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> Graph:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    return trace(net.double().eval(), (2, 4))


def images() -> Tensor:
    x = torch.rand(4, 2, 4, generator=generator(), dtype=torch.float64)
    x[0, 0], x[1, 1] = 0.0, 1.0
    return x


def loss(graph: Graph, point: Tensor, y: Tensor = LABELS) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(graph.run(point)[0], y, reduction="none")


class Recorder(nn.Module):
    """A linear network that remembers where it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Tensor] = []
        self.linear = nn.Linear(8, 3).double()

    def graph(self) -> Graph:
        graph = trace(nn.Sequential(nn.Flatten(), self.linear), (2, 4))
        points = self.points

        class Watched(Graph):
            def run(self, x: Tensor) -> tuple[Tensor, Graph]:
                points.append(x.detach().clone())
                return super().run(x)

        return Watched(graph.module, graph.nodes)


class TestWhatEveryAttackKeeps:
    @each_attack
    @each_region
    @pytest.mark.parametrize("domain", [(0.0, 1.0), None])
    def test_points_stay_in_the_region(self, kind, attack, domain):
        x = images()
        eps = torch.tensor([0.0, 1e-6, 0.1, 0.5], dtype=torch.float64)
        region = kind(eps, domain)
        point = attack(network(), x, LABELS, region, generator())
        assert region.contains(x, point).tolist() == [0.0] * 4
        assert torch.equal(point[0], x[0])

    @each_attack
    @each_region
    def test_every_example_has_its_own_radius(self, kind, attack):
        x, graph = images(), network()
        eps = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)
        point = attack(graph, x, LABELS, kind(eps, None), generator())
        order = {Box: math.inf, L2Ball: 2, L1Ball: 1}[kind]
        lengths = torch.linalg.vector_norm((point - x).flatten(1), order, dim=1)
        assert bool((lengths <= eps * (1 + 1e-12)).all())
        assert bool((lengths >= 0.5 * eps).all())

    @each_attack
    def test_a_seed_gives_the_same_points_again(self, attack):
        graph, x = network(), images()
        first, again, other = (attack(graph, x, LABELS, Box(0.3), generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert attack != fgsm() or not torch.equal(first, other)

    @each_attack
    def test_neither_inputs_nor_parameters_nor_their_gradients_change(self, attack):
        graph, x = network(), images()
        before = [p.detach().clone() for p in graph.module.parameters()]
        graph.module[1].weight.grad = torch.ones_like(graph.module[1].weight)
        attack(graph, x, LABELS, Box(0.3), generator())
        assert torch.equal(x, images())
        assert all(torch.equal(p, q) for p, q in zip(graph.module.parameters(), before, strict=True))
        grads = [p.grad for p in graph.module.parameters()]
        assert torch.equal(grads[0], torch.ones_like(grads[0]))
        assert grads[1:] == [None] * 3

    @each_attack
    @each_region
    def test_no_gradient_flows_through_the_points(self, kind, attack):
        x = images().requires_grad_()
        eps = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
        point = attack(network(), x, LABELS, kind(eps), generator())
        assert not point.requires_grad

    @each_attack
    def test_it_works_where_gradients_are_switched_off(self, attack):
        with torch.no_grad():
            off = attack(network(), images(), LABELS, Box(0.3), generator())
        assert torch.equal(off, attack(network(), images(), LABELS, Box(0.3), generator()))

    @each_attack
    def test_examples_do_not_influence_each_other(self, attack):
        graph, x = network(), images()
        together = attack(graph, x, LABELS, Box(0.3), generator())
        x[1:] = 0.5
        assert torch.allclose(attack(graph, x, LABELS, Box(0.3), generator())[0], together[0], atol=1e-12)

    @each_attack
    def test_a_batch_may_be_empty(self, attack):
        point = attack(network(), images()[:0], LABELS[:0], Box(0.3), generator())
        assert point.shape == (0, 2, 4)

    @each_attack
    def test_a_network_in_training_is_attacked_at_the_statistics_it_was_fixed_at(self, attack):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
        ).double()
        graph = trace(net.train(), (2, 4))
        fixed = graph.run(images())[1]
        mean, batches = net[2].running_mean.clone(), net[2].num_batches_tracked.clone()
        for target in (fixed, graph.frozen()):
            attack(target, images(), LABELS, Box(0.3), generator())
        assert torch.equal(net[2].running_mean, mean)
        assert torch.equal(net[2].num_batches_tracked, batches)


class TestPgd:
    @each_region
    @pytest.mark.parametrize("kind_of_loss", ["cross-entropy", "margin"])
    def test_it_finds_the_optimum_of_a_linear_network(self, kind, kind_of_loss):
        net = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()
        graph, x, y = trace(net, (2, 4)), images(), torch.tensor([0, 1, 1, 0])
        W = net[1].weight.detach()
        rows = (W[1 - y] - W[y]).view(4, 1, 2, 4)
        region: Region = kind(0.2, None)
        point = Pgd(steps=30, step=0.25, loss=kind_of_loss)(graph, x, y, region, generator())
        reached = ((point - x) * rows[:, 0]).flatten(1).sum(1)
        largest = -region.minimise(torch.zeros_like(x), -rows)[:, 0]
        assert torch.allclose(reached, largest, atol=1e-6, rtol=0)

    def test_it_finds_the_optimum_of_a_linear_network_at_the_border_of_the_domain(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()
        graph, x, y = trace(net, (2, 4)), images(), torch.tensor([0, 1, 1, 0])
        rows = (net[1].weight[1 - y] - net[1].weight[y]).detach().view(4, 1, 2, 4)
        point = Pgd(steps=10, step=0.5)(graph, x, y, Box(0.2), generator())
        reached = (point * rows[:, 0]).flatten(1).sum(1)
        assert torch.allclose(reached, -Box(0.2).minimise(x, -rows)[:, 0], atol=1e-12, rtol=0)

    @each_region
    def test_it_is_stronger_than_random_points(self, kind):
        graph, x, region = network(), images(), kind(0.3)
        found = loss(graph, Pgd(steps=20, step=0.25)(graph, x, LABELS, region, generator()))
        for seed in range(50):
            assert bool((found >= loss(graph, region.sample(x, generator(seed))) - 1e-12).all())

    @pytest.mark.parametrize("restarts", [1, 3])
    def test_the_best_point_met_is_kept(self, restarts):
        """With steps that overshoot, the last point is rarely the best one."""
        recorder = Recorder()
        graph, x = recorder.graph(), images()
        point = Pgd(steps=6, step=2.0, restarts=restarts)(graph, x, LABELS, L2Ball(0.3), generator())
        met = torch.stack([loss(graph, p) for p in recorder.points[: 7 * restarts]])
        assert torch.equal(loss(graph, point), met.amax(0))

    @pytest.mark.parametrize(("decay", "lengths"), [(1.0, (0.15, 0.15, 0.15)), (0.5, (0.15, 0.075, 0.0375))])
    def test_it_steps_and_then_projects(self, decay, lengths):
        recorder = Recorder()
        x, region = images(), Box(0.3)
        Pgd(steps=3, step=0.5, decay=decay)(recorder.graph(), x, LABELS, region, generator())
        before, *others = recorder.points
        assert torch.equal(before, region.sample(x, generator()))
        for after, length in zip(others, lengths, strict=True):
            at = before.clone().requires_grad_()
            F.cross_entropy(recorder.linear(at.flatten(1)), LABELS, reduction="sum").backward()
            assert torch.allclose(after, region.project(x, before + length * at.grad.sign()), atol=1e-15)
            before = after

    def test_restarts_count_without_keeping_the_best_of_each(self):
        graph, x = network(), images()
        attack = Pgd(steps=1, step=0.1, restarts=4, keep_best=False)
        single = Pgd(steps=1, step=0.1, keep_best=False)
        source = generator()
        alone = torch.stack([loss(graph, single(graph, x, LABELS, Box(0.3), source)) for _ in range(4)])
        assert torch.equal(loss(graph, attack(graph, x, LABELS, Box(0.3), generator())), alone.amax(0))

    def test_the_margin_loss_moves_where_the_cross_entropy_is_flat(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            net[1].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
        graph, x, y = trace(net, (2, 4)), images(), torch.zeros(4, dtype=torch.int64)
        start = Box(0.3).sample(x, generator())
        flat = Pgd(steps=3, step=0.5, keep_best=False)(graph, x, y, Box(0.3), generator())
        steep = Pgd(steps=3, step=0.5, keep_best=False, loss="margin")(graph, x, y, Box(0.3), generator())
        assert torch.equal(flat, start)
        assert not torch.equal(steep, start)

    def test_a_loss_that_is_not_a_number_is_never_kept(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
        graph, x = trace(net, (2, 4)), images()
        with torch.no_grad():
            net[1].weight.fill_(torch.nan)
        assert torch.equal(Pgd(steps=2, step=0.5)(graph, x, LABELS, Box(0.3), generator()), x)

    @pytest.mark.parametrize(
        "options",
        [
            {"steps": 0, "step": 0.1},
            {"steps": -1, "step": 0.1},
            {"steps": 1, "step": 0.0},
            {"steps": 1, "step": -0.1},
            {"steps": 1, "step": math.nan},
            {"steps": 1, "step": 0.1, "restarts": 0},
        ],
    )
    def test_options_are_positive(self, options):
        with pytest.raises(InputError, match=r"an attack's .* must be a (whole|positive) number"):
            Pgd(**options)

    @pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
    def test_steps_never_grow(self, decay):
        with pytest.raises(InputError, match=rf"decay lies in \(0, 1\], got {decay}"):
            Pgd(steps=1, step=0.1, decay=decay)

    def test_an_unknown_loss_is_refused_by_name(self):
        attack = Pgd(steps=1, step=0.1)
        object.__setattr__(attack, "loss", "ce")  # the type checks of these tests would stop it earlier
        with pytest.raises(InputError, match="one of cross-entropy, margin, divergence, got 'ce'"):
            attack.__post_init__()


class TestFgsm:
    def test_it_takes_one_step_from_a_random_start(self):
        recorder = Recorder()
        x, region = images(), Box(0.3)
        point = fgsm()(recorder.graph(), x, LABELS, region, generator())
        (start,) = recorder.points
        assert torch.equal(start, region.sample(x, generator()))
        at = start.clone().requires_grad_()
        F.cross_entropy(recorder.linear(at.flatten(1)), LABELS, reduction="sum").backward()
        assert torch.allclose(point, region.project(x, start + 1.25 * 0.3 * at.grad.sign()), atol=1e-15)

    def test_the_step_can_be_chosen(self):
        assert fgsm(step=0.5) == Pgd(steps=1, step=0.5, keep_best=False)


def test_the_first_restart_begins_where_it_is_told():
    graph, x = trace(nn.Linear(2, 2).double(), (2,)), torch.full((3, 2), 0.5, dtype=torch.float64)
    start, y = torch.full_like(x, 0.45), torch.tensor([0, 1, 0])
    attack = Pgd(steps=1, step=1e-9, keep_best=False)
    point = attack(graph, x, y, Box(0.1), start=start)
    torch.testing.assert_close(point, start, atol=1e-8, rtol=0)

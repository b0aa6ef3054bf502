import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from tightrope.errors import InputError
from tightrope.region import Box, L1Ball, L2Ball, Region

ORDER = {Box: math.inf, L2Ball: 2, L1Ball: 1}
DUAL = {Box: 1, L2Ball: 2, L1Ball: math.inf}
REGIONS = list(ORDER)

each_region = pytest.mark.parametrize("kind", REGIONS, ids=lambda kind: kind.__name__)
each_ball = pytest.mark.parametrize("kind", [L2Ball, L1Ball], ids=lambda kind: kind.__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def distance(region: Region, x: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm((point - x).flatten(1), ORDER[type(region)], dim=1)


@st.composite
def batches(draw, dtype=torch.float64, size=None):
    """A batch of inputs in [0, 1], many at the border, and of points anywhere around them."""
    examples, features = size or draw(st.tuples(st.integers(1, 3), st.integers(1, 9)))
    width = 64 if dtype == torch.float64 else 32
    pixel = st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=width)
    far = st.floats(-10, 10, width=width) | st.sampled_from([0.0, 1.0, 1e-300, -1e-30, 1e20, -1e30])
    tensors = []
    for values in (pixel, far):
        flat = draw(st.lists(values, min_size=examples * features, max_size=examples * features))
        tensors.append(torch.tensor(flat, dtype=dtype).view(examples, features))
    return tensors


radii = st.sampled_from([0.0, 1e-12, 1e-7, 8 / 255, 0.3, 1.0]) | st.floats(0, 3)
domains = st.sampled_from([(0.0, 1.0), None])


class TestConstruction:
    @each_region
    @pytest.mark.parametrize(
        "eps", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.1]), torch.tensor([math.nan])]
    )
    def test_a_radius_is_finite_and_not_negative(self, kind, eps):
        with pytest.raises(InputError, match="finite and not negative"):
            kind(eps)

    def test_radii_form_a_vector(self):
        with pytest.raises(Exception, match="eps"):
            Box(torch.zeros(2, 2))

    @pytest.mark.parametrize("eps", [np.float32(0.5), np.float64(0.5), np.int64(2), torch.tensor(0.5), 2])
    def test_a_radius_is_a_plain_number_whatever_it_was_given_as(self, eps):
        found = Box(eps).eps
        assert type(found) is float
        assert found == eps

    @each_region
    @pytest.mark.parametrize("domain", [[0, 1], (np.float32(0), np.float32(1)), np.array([0.0, 1.0])])
    def test_the_ends_of_a_domain_are_plain_numbers_whatever_they_were_given_as(self, kind, domain):
        found = kind(0.1, domain=domain)
        assert found.domain == (0.0, 1.0)
        assert {type(end) for end in found.domain} == {float}
        assert hash(found) == hash(kind(0.1))

    @each_region
    @pytest.mark.parametrize("eps", [True, torch.tensor(True), torch.tensor(1 + 2j), 10**400, "0.1", None])
    def test_what_is_no_number_is_no_radius(self, kind, eps):
        with pytest.raises(Exception, match="eps"):
            kind(eps)

    @each_region
    @pytest.mark.parametrize("domain", ["01", 1.0, (0.0,), (torch.zeros(3), torch.ones(3))])
    def test_a_domain_is_two_numbers(self, kind, domain):
        with pytest.raises(InputError, match="the domain must be the smallest and the largest"):
            kind(0.1, domain=domain)

    @each_region
    @pytest.mark.parametrize("domain", [(1.0, 0.0), (0.0, math.nan), (math.nan, 1.0)])
    def test_a_domain_has_its_ends_in_order(self, kind, domain):
        with pytest.raises(InputError, match="the domain must be the smallest and the largest"):
            kind(0.1, domain=domain)

    @each_region
    def test_one_radius_per_example_or_one_for_all(self, kind):
        with pytest.raises(InputError, match=r"2 radii for a batch of 3"):
            kind(torch.tensor([0.1, 0.2])).corners(pixels(3, 4))

    @each_region
    def test_with_eps_changes_nothing_else(self, kind):
        assert kind(0.1, domain=(-1.0, 2.0)).with_eps(0.2) == kind(0.2, domain=(-1.0, 2.0))

    @each_region
    def test_around_some_examples_each_keeps_its_radius(self, kind):
        rows = torch.tensor([2, 0, 2])
        assert kind(torch.tensor([0.1, 0.2, 0.3])).at(rows).eps.tolist() == pytest.approx([0.3, 0.1, 0.3])
        assert kind(0.1, domain=(-1.0, 2.0)).at(rows) == kind(0.1, domain=(-1.0, 2.0))

    def test_the_norms_have_their_names(self):
        assert [kind.norm for kind in REGIONS] == ["inf", "2", "1"]


class TestCorners:
    @each_region
    def test_they_are_cut_with_the_domain(self, kind):
        x = torch.tensor([[0.0, 0.1, 0.5, 1.0]], dtype=torch.float64)
        lower, upper = kind(0.25).corners(x)
        assert torch.allclose(lower, torch.tensor([[0.0, 0.0, 0.25, 0.75]], dtype=torch.float64))
        assert torch.allclose(upper, torch.tensor([[0.25, 0.35, 0.75, 1.0]], dtype=torch.float64))

    @each_region
    def test_they_are_not_cut_without_a_domain(self, kind):
        lower, upper = kind(2.0, domain=None).corners(torch.zeros(1, 3))
        assert lower.tolist() == [[-2.0] * 3]
        assert upper.tolist() == [[2.0] * 3]

    @each_region
    def test_every_example_has_its_own_radius(self, kind):
        x, eps = pixels(3, 2, 4), torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
        lower, upper = kind(eps).corners(x)
        for i in range(3):
            alone = kind(float(eps[i])).corners(x[i : i + 1])
            assert torch.equal(lower[i : i + 1], alone[0])
            assert torch.equal(upper[i : i + 1], alone[1])

    @each_region
    def test_a_radius_of_zero_leaves_the_input(self, kind):
        x = pixels(2, 5)
        assert all(torch.equal(corner, x) for corner in kind(0.0).corners(x))

    @given(batches(), radii, domains)
    def test_they_hold_the_region(self, batch, eps, domain):
        x, point = batch
        for kind in REGIONS:
            lower, upper = kind(eps, domain).corners(x)
            inside = kind(eps, domain).project(x, point)
            assert bool(((lower <= inside) & (inside <= upper)).all())


class TestMinimise:
    @each_region
    def test_it_is_attained_where_the_domain_does_not_cut(self, kind):
        region, x, row = kind(0.4, domain=None), pixels(5, 2, 3), numbers(5, 2, 3)
        attained = ((x + region.steepest(x, -row)) * row).flatten(1).sum(1)
        assert torch.allclose(region.minimise(x, row.unsqueeze(1)).squeeze(1), attained, atol=1e-12, rtol=0)

    @each_region
    def test_it_is_the_centre_minus_eps_times_the_dual_norm(self, kind):
        x, rows = pixels(4, 6), numbers(4, 3, 6)
        eps = torch.tensor([0.0, 0.1, 0.2, 1.5], dtype=torch.float64)
        expected = (rows * x.unsqueeze(1)).sum(2) - eps[:, None] * torch.linalg.vector_norm(
            rows, DUAL[kind], dim=2
        )
        assert torch.allclose(kind(eps, domain=None).minimise(x, rows), expected, atol=1e-12, rtol=0)

    def test_a_box_is_exact_at_the_border_of_the_domain(self):
        x = torch.tensor([[0.0, 0.05, 1.0, 0.5]], dtype=torch.float64)
        rows = numbers(1, 7, 4)
        lower, upper = Box(0.1).corners(x)
        corners = torch.cartesian_prod(*torch.stack([lower[0], upper[0]], 1))
        assert torch.allclose(
            Box(0.1).minimise(x, rows)[0], (rows[0] @ corners.T).amin(1), atol=1e-12, rtol=0
        )

    @pytest.mark.parametrize("eps", [0.05, 0.3, 0.8, 1.5, 9.0])
    def test_an_l1_ball_is_exact_at_the_border_of_the_domain(self, eps):
        x = torch.tensor([[0.0, 0.05, 1.0, 0.5, 0.5]], dtype=torch.float64)
        for row in numbers(8, 5):
            ways = np.concatenate([np.eye(5), -np.eye(5)], 1)  # a variable for each way to move
            found = linprog(
                ways.T @ row.numpy(),
                A_ub=np.ones((1, 10)),
                b_ub=[eps],
                bounds=[(0, way) for way in torch.cat([1 - x[0], x[0]]).tolist()],
            )
            least = L1Ball(eps).minimise(x, row.view(1, 1, 5)).item()
            assert least == pytest.approx(found.fun + float(x[0] @ row), abs=1e-9)

    @pytest.mark.parametrize("eps", [0.05, 0.3, 0.8, 1.5, 9.0])
    def test_an_l2_ball_is_nearly_exact_at_the_border_of_the_domain(self, eps):
        """The step is `min(size / m, room)` for one m, found by bisection; two trials find most of it."""
        x, rows = pixels(5, 100).mul(4).sub(3).clamp(0, 1), numbers(5, 7, 100)
        size, room = rows.abs(), torch.where(rows > 0, x.unsqueeze(1), 1 - x.unsqueeze(1))
        low, high = torch.zeros(5, 7, 1, dtype=torch.float64), torch.full((5, 7, 1), 1e4, dtype=torch.float64)
        for _ in range(100):
            m = (low + high) / 2
            short = torch.minimum(size / m, room).norm(dim=2, keepdim=True) < eps
            low, high = torch.where(short, low, m), torch.where(short, m, high)
        exact = (rows * x.unsqueeze(1)).sum(2) - (size * torch.minimum(size / high, room)).sum(2)
        least, whole = (L2Ball(eps, domain).minimise(x, rows) for domain in ((0.0, 1.0), None))
        assert bool((least <= exact + 1e-9).all())
        assert bool((exact - least <= 0.02 * (exact - whole) + 1e-9).all())

    @each_ball
    def test_its_minimiser_lies_in_the_region_and_takes_its_value(self, kind):
        x, rows = pixels(4, 30).mul(3).sub(1).clamp(0, 1), numbers(4, 5, 30)
        for eps, domain in itertools.product((0.0, 0.1, 1.0, 20.0), ((0.0, 1.0), None)):
            region = kind(eps, domain)
            points = region.minimiser(x, rows)
            assert all(bool((region.contains(x, point) < 1e-12).all()) for point in points.unbind(1))
            lowest = region.minimise(x, rows)
            assert torch.allclose((points * rows).sum(2), lowest, atol=1e-12 + 0.01 * eps, rtol=0)

    @given(batches(), radii, domains, st.integers(0, 1000))
    def test_no_point_of_the_region_goes_below_it(self, batch, eps, domain, seed):
        x, point = batch
        rows = numbers(len(x), 3, x.shape[1], seed=seed)
        for kind in REGIONS:
            region = kind(eps, domain)
            lowest = region.minimise(x, rows)
            for inside in (
                region.project(x, point),
                region.sample(x, generator(seed)),
                region.project(x, x + region.steepest(x, -rows[:, 0])),
            ):
                assert bool(((rows @ inside.unsqueeze(2)).squeeze(2) >= lowest - 1e-11).all())

    @each_region
    def test_its_gradient_is_finite_even_for_a_row_of_zeros(self, kind):
        x, rows = pixels(2, 4).requires_grad_(), torch.zeros(2, 1, 4, dtype=torch.float64, requires_grad=True)
        eps = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
        kind(eps).minimise(x, rows).sum().backward()
        assert all(bool(torch.isfinite(t.grad).all()) for t in (x, rows, eps))

    @each_region
    def test_rows_of_zeros_yield_zero(self, kind):
        rows = torch.zeros(2, 1, 4, dtype=torch.float64)
        assert torch.equal(kind(0.1).minimise(pixels(2, 4), rows), torch.zeros(2, 1, dtype=torch.float64))

    @each_region
    def test_an_entry_without_a_coefficient_does_not_matter_wherever_it_lies(self, kind):
        """Windows that stick out of an image see zeros there, which the domain need not hold."""
        region = kind(0.6, (-2.0, -1.0))
        x, rows = torch.tensor([[-1.5, -1.2]]), torch.tensor([[[1.0, -2.0], [-0.5, 0.3]]])
        padded = [torch.nn.functional.pad(value, (1, 2)) for value in (x, rows)]
        torch.testing.assert_close(region.descend(*padded), region.descend(x, rows))

    @each_region
    @pytest.mark.parametrize("scale", [1.2e-162, 1e-170, 1e-300])
    @pytest.mark.parametrize("eps", [1e-7, 0.1])
    def test_the_squares_of_small_rows_are_not_missing(self, kind, scale, eps):
        x, rows = torch.zeros(1, 784, dtype=torch.float64), -torch.ones(1, 1, 784, dtype=torch.float64)
        large, small = (kind(eps).minimise(x, factor * rows).item() for factor in (1.0, scale))
        assert small / scale == pytest.approx(large, rel=1e-9)

    def test_entries_of_one_size_share_the_gradient_of_an_l1_ball(self):
        rows = torch.ones(1, 1, 6, dtype=torch.float64, requires_grad=True)
        x = torch.full((1, 6), 0.5, dtype=torch.float64)
        L1Ball(0.3).minimise(x, rows).sum().backward()
        step = rows.grad[0, 0] - 0.5
        assert bool((step <= 0).all())
        assert step.sum().item() == pytest.approx(-0.3)

    @each_region
    def test_its_gradient_is_right(self, kind):
        eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
        x, rows = (pixels(2, 4) * 0.4 + 0.3).requires_grad_(), numbers(2, 3, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda e, c, r: kind(e).minimise(c, r), (eps, x, rows))


class TestProject:
    @settings(max_examples=100)
    @given(batches(), radii, domains)
    def test_a_projected_point_lies_inside_and_stays_where_it_is(self, batch, eps, domain):
        x, point = batch
        for kind in REGIONS:
            region = kind(eps, domain)
            inside = region.project(x, point)
            assert torch.equal(region.project(x, inside), inside)
            assert region.contains(x, inside).tolist() == [0.0] * len(x)
            assert bool((distance(region, x, inside) <= eps + 4e-16).all())
            assert torch.equal(region.clip(inside), inside)

    @settings(max_examples=100)
    @given(batches(torch.float32), radii, domains)
    def test_the_same_in_single_precision(self, batch, eps, domain):
        x, point = batch
        for kind in REGIONS:
            region = kind(eps, domain)
            inside = region.project(x, point)
            assert region.contains(x, inside).tolist() == [0.0] * len(x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("eps", [1e-9, 1e-3, 0.3, 30.0, 2000.0])
    @each_region
    def test_the_same_for_images(self, kind, eps, dtype):
        x = pixels(8, 3, 32, 32).to(dtype)
        for spread in (1e-4, 0.1, 10.0):
            region = kind(eps)
            inside = region.project(x, x + spread * numbers(8, 3, 32, 32).to(dtype))
            assert region.contains(x, inside).tolist() == [0.0] * 8

    @given(batches(), radii, domains)
    def test_a_point_inside_is_not_touched(self, batch, eps, domain):
        x, point = batch
        for kind in REGIONS:
            region = kind(eps, domain)
            nearer = region.clip(x + (point - x) * (eps / (1 + 9 * point.abs().max())) / 2)
            inside = nearer[distance(region, x, nearer) <= eps]
            around = x[distance(region, x, nearer) <= eps]
            assert torch.equal(region.project(around, inside), inside)

    @each_region
    def test_it_finds_the_nearest_point_where_the_domain_does_not_cut(self, kind):
        """The nearest point p of a convex set to z has <z - p, q - p> <= 0 for every q of the set."""
        region, x = kind(0.7, domain=None), pixels(20, 6)
        point = x + numbers(20, 6)
        nearest = region.project(x, point)
        for seed in range(50):
            towards = region.project(x, x + numbers(20, 6, seed=seed)) - nearest
            assert bool((((point - nearest) * towards).sum(1) <= 1e-12).all())

    @each_region
    def test_an_outer_point_goes_to_the_surface(self, kind):
        region, x = kind(0.7, domain=None), pixels(20, 6)
        assert torch.allclose(
            distance(region, x, region.project(x, x + 5 * numbers(20, 6))),
            torch.full((20,), 0.7, dtype=torch.float64),
            atol=1e-12,
        )

    def test_the_l1_ball_against_a_threshold_found_by_bisection(self):
        step = numbers(1, 50)
        low, high = 0.0, float(step.abs().max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (step.abs() - middle).clamp(min=0).sum() > 2.0 else (low, middle)
        expected = step.sign() * (step.abs() - high).clamp(min=0)
        got = L1Ball(2.0, domain=None).project(torch.zeros(1, 50, dtype=torch.float64), step)
        assert torch.allclose(got, expected, atol=1e-12, rtol=0)

    @each_region
    def test_each_example_is_projected_for_itself(self, kind):
        x, point = pixels(4, 2, 3), numbers(4, 2, 3)
        eps = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)
        together = kind(eps).project(x, point)
        for i in range(4):
            alone = kind(float(eps[i])).project(x[i : i + 1], point[i : i + 1])
            assert torch.equal(together[i : i + 1], alone)

    @each_region
    def test_shapes_are_kept(self, kind):
        assert kind(0.1).project(pixels(2, 3, 4, 4), pixels(2, 3, 4, 4, seed=5)).shape == (2, 3, 4, 4)


class TestContains:
    @each_region
    def test_it_says_by_how_much_a_point_leaves(self, kind):
        x = torch.full((2, 1), 0.5, dtype=torch.float64)
        point = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
        inside, outside = kind(0.2).contains(x, point).tolist()
        assert inside == 0
        assert outside == pytest.approx(0.1)

    @each_region
    def test_leaving_the_domain_is_leaving_the_region(self, kind):
        x = torch.tensor([[0.9]], dtype=torch.float64)
        assert kind(0.5).contains(x, x + 0.2).tolist() == [pytest.approx(0.1)]
        assert kind(0.5, domain=None).contains(x, x + 0.2).tolist() == [0]

    @each_region
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_a_number_lies_outside(self, kind, value):
        x = torch.full((1, 2), 0.5)
        assert kind(0.5).contains(x, torch.tensor([[0.5, value]])).tolist() == [math.inf]

    def test_the_balls_are_smaller_than_the_box(self):
        x = torch.full((1, 4), 0.5, dtype=torch.float64)
        corner = x + 0.1
        assert Box(0.1).contains(x, corner) < 1e-15
        assert L2Ball(0.2).contains(x, corner) == 0 < L2Ball(0.19).contains(x, corner)
        assert L1Ball(0.41).contains(x, corner) == 0 < L1Ball(0.39).contains(x, corner)


class TestSample:
    @given(batches(), radii, domains, st.integers(0, 1000))
    def test_it_lies_inside(self, batch, eps, domain, seed):
        x, _ = batch
        for kind in REGIONS:
            region = kind(eps, domain)
            assert region.contains(x, region.sample(x, generator(seed))).tolist() == [0.0] * len(x)

    @each_region
    @pytest.mark.parametrize("eps", [1e-17, 1e-16, 3e-16, 1e-15])
    def test_it_lies_inside_even_where_the_radius_is_as_small_as_rounding(self, kind, eps):
        x = pixels(200, 3)
        assert not kind(eps).contains(x, kind(eps).sample(x, generator())).any()

    @each_region
    def test_a_seed_gives_the_same_point_again(self, kind):
        x = pixels(2, 3)
        assert torch.equal(kind(0.1).sample(x, generator(4)), kind(0.1).sample(x, generator(4)))
        assert not torch.equal(kind(0.1).sample(x, generator(4)), kind(0.1).sample(x, generator(5)))

    @each_region
    def test_it_fills_the_region_and_has_no_favourite_direction(self, kind):
        region, x = kind(0.2, domain=None), torch.zeros(4000, 3, dtype=torch.float64)
        step = region.sample(x, generator())
        assert bool((step.mean(0).abs() < 0.01).all())
        share = distance(region, x, step) / 0.2
        assert float(share.max()) > 0.99
        assert float(share.min()) < 0.2
        assert len({tuple(sign) for sign in step.sign().tolist()}) == 8

    @each_region
    def test_every_example_has_its_own_radius(self, kind):
        eps = torch.tensor([0.0, 0.01, 0.3], dtype=torch.float64)
        x = pixels(3, 50)
        lengths = torch.stack([distance(kind(eps), x, kind(eps).sample(x, generator(s))) for s in range(20)])
        assert bool((lengths <= eps + 1e-16).all())
        assert lengths[:, 2].amax() > 0.1


class TestSteepest:
    @each_region
    def test_no_step_of_that_length_climbs_more(self, kind):
        region, x, gradient = kind(0.3, domain=None), pixels(6, 5), numbers(6, 5)
        step = region.steepest(x, gradient)
        assert torch.allclose(distance(region, x, x + step), torch.full((6,), 0.3, dtype=torch.float64))
        climb = (gradient * step).sum(1)
        assert torch.allclose(climb, 0.3 * torch.linalg.vector_norm(gradient, DUAL[kind], dim=1))
        for seed in range(20):
            other = region.project(x, x + numbers(6, 5, seed=seed)) - x
            assert bool(((gradient * other).sum(1) <= climb + 1e-12).all())

    @each_region
    @pytest.mark.parametrize("size", [1e-30, 1e-43, 1e30])
    def test_the_size_of_the_gradient_does_not_matter(self, kind, size):
        """A confident network's gradient is tiny: its squares are 0 in single precision."""
        x = torch.full((1, 4), 0.5)
        gradient = torch.tensor([[1.0, -1.0, 1.0, 1.0]]) * size
        step = kind(0.25).steepest(x, gradient)
        assert float(torch.linalg.vector_norm(step, ORDER[kind])) == pytest.approx(0.25)

    @each_region
    def test_where_there_is_no_gradient_there_is_no_step(self, kind):
        step = kind(0.3).steepest(pixels(2, 3), torch.zeros(2, 3, dtype=torch.float64))
        assert step.tolist() == [[0.0] * 3] * 2

    @each_region
    def test_a_zero_gradient_has_a_finite_derivative(self, kind):
        gradient = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        kind(0.3).steepest(pixels(1, 3), gradient).sum().backward()
        assert gradient.grad is None or bool(torch.isfinite(gradient.grad).all())

    @each_region
    def test_every_example_has_its_own_radius(self, kind):
        eps = torch.tensor([0.0, 0.1], dtype=torch.float64)
        x, gradient = pixels(2, 2, 3), numbers(2, 2, 3)
        step = kind(eps).steepest(x, gradient)
        assert step.shape == x.shape
        assert torch.allclose(distance(kind(eps), x, x + step), eps)


@pytest.mark.parametrize("kind", REGIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-200), (torch.float64, 1e200), (torch.float32, 1e-30)]
)
def test_rows_whose_squares_are_no_numbers_reach_as_far_as_others(kind, dtype, size):
    """Weights behind them may bring the scale back: a neuron's box may not collapse to a point."""
    x = torch.full((1, 2), 0.5, dtype=dtype)
    rows = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=dtype)
    region = kind(0.25, domain=None)
    reach, plain = region.minimise(x, size * rows), region.minimise(x, rows)
    torch.testing.assert_close(reach / size, plain)


@pytest.mark.parametrize("kind", REGIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("eps", [0.0, 0.3, torch.tensor([0.1, 0.0, 0.5], dtype=torch.float64)])
def test_the_minimiser_attains_the_minimum_of_every_row(kind, eps):
    torch.manual_seed(0)
    x = torch.rand(3, 2, 2, dtype=torch.float64)
    rows = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    region = kind(eps)
    points = region.minimiser(x, rows)
    torch.testing.assert_close((rows * points).flatten(2).sum(2), region.minimise(x, rows))
    unbounded = kind(eps, domain=None)
    for point in unbounded.minimiser(x, rows).unbind(1):
        assert float(unbounded.contains(x, point).max()) < 1e-12

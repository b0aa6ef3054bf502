import math

import pytest
import torch

from tightrope.errors import InputError
from tightrope.spec import Spec, smallest_margin

LIKE = torch.empty(0, dtype=torch.float64)


def test_a_margin_is_the_logit_of_the_label_minus_another():
    logits = torch.tensor([[3.0, 1.0, 7.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
    spec = Spec.margins(torch.tensor([2, 0]), 3, LIKE)
    margins = (spec.rows @ logits.unsqueeze(2)).squeeze(2)
    assert margins.tolist() == [[4.0, 6.0, 0.0], [0.0, 1.0, -2.0]]


def test_the_label_s_own_row_is_zero():
    y = torch.tensor([1, 0, 3])
    assert not Spec.margins(y, 4, LIKE).rows[torch.arange(3), y].any()


def test_the_logits_are_their_own_specification():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = Spec.logits(5, 3, LIKE).rows
    assert torch.equal((rows @ logits.unsqueeze(2)).squeeze(2), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_take_the_dtype_of_what_they_are_for(dtype):
    like = torch.empty(0, dtype=dtype)
    assert Spec.margins(torch.tensor([0]), 2, like).rows.dtype == dtype
    assert Spec.logits(1, 2, like).rows.dtype == dtype


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=rf"labels must lie in 0\.\.2.*got .*{label}"):
        Spec.margins(torch.tensor([0, label]), 3, LIKE)


def test_a_single_output_has_no_margins():
    with pytest.raises(InputError, match="1 output has no wrong class"):
        Spec.margins(torch.tensor([0]), 1, LIKE)


def test_a_batch_may_be_empty():
    assert Spec.margins(torch.empty(0, dtype=torch.int64), 3, LIKE).rows.shape == (0, 3, 3)


class TestSmallestMargin:
    def test_it_leaves_the_label_s_own_margin_out(self):
        margins = torch.tensor([[0.0, 2.0, 5.0], [3.0, 0.0, -1.0]])
        assert smallest_margin(margins, torch.tensor([0, 1])).tolist() == [2.0, -1.0]

    def test_what_is_not_a_number_is_never_safe(self):
        margins = torch.tensor([[0.0, math.nan, 5.0], [math.nan, 1.0, 0.0]])
        assert smallest_margin(margins, torch.tensor([0, 2])).tolist() == [-math.inf, -math.inf]

    def test_a_label_s_own_margin_may_be_anything(self):
        assert smallest_margin(torch.tensor([[math.nan, 1.0]]), torch.tensor([0])).tolist() == [1.0]

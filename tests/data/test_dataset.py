import pytest
import torch

from tightrope.data import DataSet, Split
from tightrope.errors import DataError

X = torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
SPLIT = Split(X, Y)


def test_images_are_float32_pixels_over_255():
    index = torch.tensor([4, 0])
    assert torch.equal(SPLIT.images(index), X[index].float() / 255)
    bounds = Split(torch.tensor([[0, 255]], dtype=torch.uint8), Y[:1]).images(torch.tensor([0]))
    assert bounds.tolist() == [[0.0, 1.0]]


def test_float_images_are_handed_on_unchanged():
    x = torch.rand(6, 3)
    assert torch.equal(Split(x, Y).images(torch.arange(6)), x)


def test_subset_keeps_the_order_asked_for():
    part = SPLIT.subset(torch.tensor([5, 1]))
    assert torch.equal(part.x, X[[5, 1]])
    assert part.y.tolist() == [2, 1]
    assert (len(part), part.shape) == (2, (1, 2, 2))


def test_to_moves_images_and_labels():
    assert torch.equal(SPLIT.to("cpu").x, X)


def test_identity_tells_apart_values_order_shape_and_dtype():
    others = [
        SPLIT.subset(torch.tensor([1, 0, 2, 3, 4, 5])),
        SPLIT.subset(torch.arange(5)),
        Split(X, Y.flip(0)),
        Split(X.flatten(1), Y),
        Split(X.float() / 255, Y),
    ]
    assert len({split.identity() for split in [SPLIT, *others]}) == 6
    assert Split(X.clone(), Y.clone()).identity() == SPLIT.identity()
    assert Split(X.transpose(2, 3).contiguous().transpose(2, 3), Y).identity() == SPLIT.identity()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.int(), Y, "uint8 or float32, got torch.int32"),
        (X.double(), Y, "uint8 or float32, got torch.float64"),
        (X, Y.int(), "int64 class numbers, got torch.int32"),
        (X, Y[:5], "one label per image"),
        (Y.byte(), Y, "one label per image"),
        (X[:0], Y[:0], "no examples"),
        (torch.full((6, 2), torch.nan), Y, "found NaN"),
        (torch.full((6, 2), torch.inf), Y, "values from inf"),
        (torch.full((6, 2), 1.5), Y, r"lie in \[0, 1\]"),
        (torch.full((6, 2), -0.1), Y, r"lie in \[0, 1\]"),
        (X, Y - 1, "found -1"),
    ],
)
def test_a_split_refuses_what_it_cannot_hold(x, y, message):
    with pytest.raises(DataError, match=message):
        Split(x, y)


def test_a_data_set_checks_its_splits_against_each_other():
    names = ("a", "b", "c")
    assert DataSet("own", SPLIT, SPLIT, 3, names).classes == 3
    with pytest.raises(DataError, match="a training label is 2, expected 0 to 1"):
        DataSet("own", SPLIT, SPLIT, 2, names[:2])
    with pytest.raises(DataError, match="same shape"):
        DataSet("own", SPLIT, Split(X.flatten(1), Y), 3, names)
    with pytest.raises(DataError, match="2 names for 3 classes"):
        DataSet("own", SPLIT, SPLIT, 3, names[:2])

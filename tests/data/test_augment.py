import pytest
import torch
from torch.nn.functional import pad

from tightrope.data import Augment
from tightrope.errors import InputError

X = torch.rand(200, 3, 5, 7, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", ["edge", "zeros"])
def test_every_result_is_a_crop_of_the_padded_image_and_all_crops_occur(flip, mode):
    """Against the definition: pad, maybe flip, cut out a window."""
    padded = pad(X, (2, 2, 2, 2), mode="replicate" if mode == "edge" else "constant")
    versions = [padded, padded.flip(3)] if flip else [padded]
    crops = torch.stack(
        [p[:, :, top : top + 5, left : left + 7] for p in versions for top in range(5) for left in range(5)],
        dim=1,
    )
    moved = Augment(flip, 2, mode)(X, generator())
    same = (crops == moved.unsqueeze(1)).flatten(2).all(2)
    assert same.any(1).all()
    assert same.any(0).all()


def test_flipping_alone_turns_about_half_of_the_images():
    moved = Augment(flip=True)(X, generator())
    turned = (moved == X.flip(3)).flatten(1).all(1)
    assert torch.equal(moved[~turned], X[~turned])
    assert 70 < turned.sum() < 130


def test_off_it_returns_the_batch_itself_and_draws_nothing():
    random = generator()
    before = random.get_state()
    assert Augment()(X, random) is X
    assert torch.equal(random.get_state(), before)


def test_the_generator_decides_and_the_batch_is_left_alone():
    augment, before = Augment(True, 2, "zeros"), X.clone()
    assert torch.equal(augment(X, generator(1)), augment(X, generator(1)))
    assert not torch.equal(augment(X, generator(1)), augment(X, generator(2)))
    assert torch.equal(X, before)


def test_bytes_stay_bytes():
    x = (X * 255).byte()
    assert Augment(True, 1, "zeros")(x, generator()).dtype == torch.uint8


def test_a_shift_may_leave_the_image():
    assert Augment(pad=20, mode="zeros")(X, generator()).shape == X.shape


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="negative, got -1"):
        Augment(pad=-1)
    with pytest.raises(InputError, match="'edge' or 'zeros', got 'reflect'"):
        Augment(mode="reflect")
    with pytest.raises(InputError, match="only images"):
        Augment(flip=True)(X.flatten(1), generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_works_on_the_batch_s_device_wherever_the_generator_is(where):
    moved = Augment(True, 2, "zeros")(X.cuda(), torch.Generator(where).manual_seed(0))
    assert moved.is_cuda
    if where == "cpu":
        assert torch.equal(moved.cpu(), Augment(True, 2, "zeros")(X, generator()))

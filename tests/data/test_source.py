import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from tightrope.data import DataSet, Source, Split, as_source
from tightrope.data.source import LoaderSource, TensorSource
from tightrope.errors import DataError

X = torch.randint(0, 256, (10, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 4
SPLIT = Split(X, Y)
ORDER = [torch.tensor([3, 1, 7, 7]), torch.tensor([0]), torch.tensor([9, 2])]


class Examples(Dataset):
    """A map-style dataset over a list; an exception in the list is raised when its turn comes."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        example = self.examples[index]
        if isinstance(example, Exception):
            raise example
        return example


def floats():
    return [(x.float() / 255, int(y)) for x, y in zip(X, Y, strict=True)]


SOURCES = {
    "split": lambda: as_source(SPLIT),
    "float split": lambda: as_source(Split(X.float() / 255, Y)),
    "tensor dataset": lambda: as_source(TensorDataset(X, Y.int())),
    "double tensor dataset": lambda: as_source(TensorDataset(X.double() / 255, Y)),
    "two tensors": lambda: as_source((X, Y)),
    "two arrays": lambda: as_source([X.numpy(), Y.numpy()]),
    "dataset": lambda: as_source(Examples(floats())),
    "loader": lambda: as_source(DataLoader(Examples(floats()), batch_size=3, shuffle=True)),
    "loader of tensors": lambda: as_source(DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True)),
    "loader with a worker": lambda: as_source(DataLoader(Examples(floats()), num_workers=1)),
    "dataset of bytes": lambda: as_source(Examples(list(zip(X, Y, strict=True)))),
    "dataset of arrays": lambda: as_source(
        Examples([(x.double().numpy(), np.int32(y)) for x, y in floats()])
    ),
    "dataset with a worker": lambda: LoaderSource(Examples(floats()), workers=1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_batches_in_the_order_asked_for(name):
    source = SOURCES[name]()
    assert isinstance(source, Source)
    assert (len(source), source.shape) == (10, (1, 2, 3))
    assert torch.equal(source.labels(), Y)
    batches = list(source.batches(iter(ORDER)))
    assert len(batches) == 3
    for (x, y, index), asked in zip(batches, ORDER, strict=True):
        assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
        torch.testing.assert_close(x, X[asked].float() / 255, rtol=0, atol=1e-7)
        assert torch.equal(y, Y[asked])
        assert torch.equal(index, asked)


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_does_not_share_memory_with_the_data(name):
    source = SOURCES[name]()
    for x, _, _ in source.batches(ORDER):
        x.zero_()
    assert next(source.batches(ORDER))[0].any()


@pytest.mark.parametrize("name", SOURCES)
def test_identity_is_the_same_each_time(name):
    assert SOURCES[name]().identity() == SOURCES[name]().identity()


def test_a_tensor_source_is_identified_by_its_split():
    assert as_source(SPLIT).identity() == SPLIT.identity()


def test_a_dataset_is_identified_by_its_length_images_and_labels():
    examples = floats()
    others = [examples[:9], [(1 - x, y) for x, y in examples], [(x, 3 - y) for x, y in examples]]
    assert len({as_source(Examples(list_)).identity() for list_ in [examples, *others]}) == 4


class Random(Examples):
    """Draws an image from every generator there is, whatever the example."""

    def __getitem__(self, index):
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor(drawn * 2).view(1, 2, 3), super().__getitem__(index)[1]


class Seldom(Examples):
    """Turns an image around once in 20 times."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x.flip(2) if random.random() < 0.05 else x), y


@pytest.mark.parametrize("kind", [Random, Seldom])
def test_random_transforms_do_not_change_the_identity_of_a_dataset(kind):
    assert len({as_source(kind(floats())).identity() for _ in range(10)}) == 1
    relabelled = [(x, 3 - y) for x, y in floats()]
    assert as_source(kind(floats())).identity() != as_source(kind(relabelled)).identity()


def drawn(order, workers=0, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [x for x, _, _ in LoaderSource(Random(floats()), workers).batches(order)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_a_dataset_draws_for_a_batch_depends_on_the_seed_and_the_batch_alone(workers):
    expected = drawn(ORDER)
    for begin in range(3):
        batches = drawn(ORDER[begin:], workers)
        assert all(torch.equal(x, y) for x, y in zip(batches, expected[begin:], strict=True))
    assert not torch.equal(drawn(ORDER, workers, seed=1)[0], expected[0])
    assert len(torch.cat(expected).unique()) == 3 * 7  # nothing is drawn twice


def test_what_a_dataset_draws_is_not_taken_from_the_caller_s_random_numbers():
    with torch.random.fork_rng():
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        source = LoaderSource(Random(floats()))
        source.identity()
        list(source.batches(ORDER))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_source_is_returned_as_it_is():
    source = TensorSource(SPLIT)
    assert as_source(source) is source


IMAGE = torch.zeros(1, 2, 3)
BAD = {
    "range": ((IMAGE + 2, 0), r"example 5: .*lie in \[0, 1\], found values from 2 to 2"),
    "nan": ((IMAGE * torch.nan, 0), "example 5: .*found NaN"),
    "shape": ((torch.zeros(1, 3, 3), 0), r"example 5 is \(1, 3, 3\), .* example 0 is \(1, 2, 3\)"),
    "dtype": ((IMAGE.byte(), 0), "example 5 is .* torch.uint8, that of example 0 is .* torch.float32"),
    "float label": ((IMAGE, 1.0), "label of example 5 is 1.0, expected an integer"),
    "float tensor label": ((IMAGE, torch.tensor(1.0)), "label of example 5 is tensor"),
    "negative label": ((IMAGE, -1), "example 5: .*found -1"),
    "no image": (("path.png", 0), "image of example 5 is a str"),
    "no pair": ({"image": IMAGE}, "example 5 is a dict, expected a pair"),
    "triple": ((IMAGE, 0, 0), "example 5 is a tuple"),
    "unreadable": (OSError("truncated file"), r"example 5 cannot be read \(OSError: truncated file\)"),
}


@pytest.mark.parametrize(("case", "workers"), [*((case, 0) for case in BAD), ("range", 1), ("unreadable", 1)])
def test_a_bad_example_is_named_in_one_line(case, workers):
    bad, message = BAD[case]
    examples = floats()
    examples[5] = bad
    source = LoaderSource(Examples(examples), workers=workers)
    assert len(next(source.batches(ORDER))[0]) == 4
    with pytest.raises(DataError, match=message) as caught:
        list(source.batches([torch.tensor([4, 5, 6])]))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):
        source.labels()


def test_images_of_an_unusable_type_are_refused():
    with pytest.raises(DataError, match=r"example 3: .*uint8 or float32, got torch\.int32"):
        list(as_source(Examples([(IMAGE.int(), 0)] * 4)).batches([torch.tensor([3])]))


SPLIT_SET = TensorDataset(X, Y)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(floats())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataSet("own", SPLIT, SPLIT, 4, tuple("abcd")), r"own holds .* data\.train"),
        (Stream(), "Stream cannot be read by index"),
        (3, "int cannot be read by index"),
        (Examples([]), "Examples is empty"),
        (TensorDataset(X), "got 1 tensors"),
        ((X, Y[:9]), "10 and 9 images and labels"),
        ((X, Y, Y), "got 3 tensors"),
        (DataLoader(Stream()), "own, which would not be used|cannot be read by index"),
        (DataLoader(TensorDataset(X, Y), collate_fn=list), "collate_fn of its own"),
        (TensorDataset(X, Y.float()), "int64 class numbers, got torch.float32"),
        (TensorDataset(X.float(), Y), r"lie in \[0, 1\]"),
    ],
)
def test_what_is_no_source_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        as_source(data)


PICKS = {
    "a subset": {"sampler": SubsetRandomSampler(range(10))},
    "the first": {"sampler": SequentialSampler(range(7))},
    "the first, one by one": {"sampler": SequentialSampler(range(7)), "batch_size": None},
    "a few": {"sampler": RandomSampler(SPLIT_SET, num_samples=7)},
    "all, twice": {"sampler": RandomSampler(SPLIT_SET, num_samples=20)},
    "with replacement": {"sampler": RandomSampler(SPLIT_SET, replacement=True)},
    "of a few": {"sampler": RandomSampler(range(7), num_samples=10)},
    "batches of a subset": {"batch_sampler": BatchSampler(SubsetRandomSampler(range(5)), 2, False)},
    "batches of the first": {"batch_sampler": BatchSampler(SequentialSampler(range(7)), 2, False)},
    "given batches": {"batch_sampler": [[0, 1], [4]]},
}


@pytest.mark.parametrize("case", PICKS)
def test_a_loader_that_picks_examples_is_refused(case):
    with pytest.raises(DataError, match=r"picks examples.* or a torch\.utils\.data\.Subset of it"):
        as_source(DataLoader(SPLIT_SET, **PICKS[case]))


WHOLE = {
    "in order": {"sampler": SequentialSampler(range(10))},
    "shuffled": {"sampler": RandomSampler(SPLIT_SET)},
    "by a batch sampler": {"batch_sampler": BatchSampler(RandomSampler(SPLIT_SET), 3, True)},
    "one by one": {"batch_size": None},
    "one by one, shuffled": {"batch_size": None, "shuffle": True},
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_loader_of_its_whole_dataset_is_read(case):
    assert torch.equal(as_source(DataLoader(SPLIT_SET, **WHOLE[case])).labels(), Y)


@pytest.mark.parametrize("nothing", [[], (), DataLoader([])], ids=["list", "tuple", "loader"])
def test_data_without_examples_are_refused(nothing):
    with pytest.raises(DataError, match=r"(list|tuple) is empty: give at least one example"):
        as_source(nothing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("data", [SPLIT, Examples(list(zip(X, Y, strict=True)))], ids=["split", "dataset"])
def test_batches_are_on_the_device_and_bit_for_bit_those_of_the_cpu(data):
    source = as_source(data, "cuda")
    assert not source.labels().is_cuda
    assert source.identity() == as_source(data).identity()
    for batch, expected in zip(source.batches(ORDER), as_source(data).batches(ORDER), strict=True):
        for tensor, same in zip(batch, expected, strict=True):
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), same)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("digits", r"'digits' names a data set: load it, such as tightrope\.data\.load\('digits'\)\.train"),
        ((np.zeros((3, 2), "f4"), np.array(list("abc"))), "the labels cannot be made a tensor, of dtype <U1"),
        ((np.array([[object()]]), np.array([0])), "the images cannot be made a tensor, of dtype object"),
        ([(np.array([None, None]), 0)], "the image of example 0 cannot be made a tensor, of dtype object"),
    ],
)
def test_what_holds_no_numbers_is_named(data, said):
    with pytest.raises(DataError, match=said):
        as_source(data)

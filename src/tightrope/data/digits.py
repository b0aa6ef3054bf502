"""scikit-learn's digits: 1,797 handwritten digits of 8x8 grey pixels, bundled, so never missing."""

from __future__ import annotations

import torch

from tightrope.data.dataset import DataSet, Split
from tightrope.data.split import hold_out


def load_digits() -> DataSet:
    """The digits with images `(1, 8, 8)` as float32 in [0, 1]; a stratified, fixed fifth is for testing."""
    from sklearn import datasets  # takes a second to import

    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    everything = Split(x, torch.from_numpy(bunch.target).long())
    train, test = hold_out(everything.y, count=360, seed=0)
    names = tuple(str(digit) for digit in range(10))
    return DataSet("digits", everything.subset(train), everything.subset(test), 10, names)

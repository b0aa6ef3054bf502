"""Data sets, held-out splits, augmentation, and the sources that training reads batches from."""

from tightrope.data.augment import Augment
from tightrope.data.catalogue import load, names
from tightrope.data.dataset import DataSet, Split
from tightrope.data.source import Source, as_source
from tightrope.data.split import hold_out

__all__ = ["Augment", "DataSet", "Source", "Split", "as_source", "hold_out", "load", "names"]

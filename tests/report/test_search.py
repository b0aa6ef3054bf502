"""The picture of a search's trials."""

import re

from tightrope.report import figures


def test_the_picture_shows_the_trials_and_not_the_way_to_the_origin(drawn):
    points = {0: (0.95, 0.86, True, "0"), 1: (0.96, 0.84, True, "1"), 2: (0.90, 0.60, False, "2")}
    svg = figures.front(points, [0, 1], "key", "alt")
    labels = [float(label) for label in re.findall(r">([\d.]+)%<", svg)]
    assert min(labels) >= 55.0
    assert svg.count("<title>") == 2 * len(points)  # each is named in both panels

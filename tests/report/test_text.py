"""Numbers as the pages write them."""

import pytest

from tightrope.report.text import eps_text


@pytest.mark.parametrize(
    ("eps", "text"), [(0.3, "0.3"), (8 / 255, "8/255"), (2 / 255, "2/255"), (0, "0"), (0.12345678, "0.1235")]
)
def test_eps_is_written_as_people_write_it(eps, text):
    assert eps_text(eps) == text

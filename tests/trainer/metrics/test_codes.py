"""Use, perplexity and collisions of codes against a count by hand."""

import math

import pytest

from .conftest import load


def test_codes_against_a_count_by_hand():
    metric = load("codes")
    metric.add_batch(codes=[[0, 3], [1, 3], [1, 3]])
    metric.add_batch(codes=[[2, 3]])
    values = metric.compute(codebook_size=4)
    entropy = -(0.25 * math.log(0.25) * 2 + 0.5 * math.log(0.5))
    assert values["use@1"] == 0.75 and values["dead@1"] == 1
    assert values["perplexity@1"] == pytest.approx(math.exp(entropy))
    assert values["use@2"] == 0.25 and values["dead@2"] == 3 and values["perplexity@2"] == pytest.approx(1)
    assert values["collisions"] == 0.5


def test_a_code_beyond_the_codebook_is_refused():
    with pytest.raises(ValueError, match="is 4; codes go from 0 to 3"):
        load("codes").compute(codes=[[0, 4]], codebook_size=4)

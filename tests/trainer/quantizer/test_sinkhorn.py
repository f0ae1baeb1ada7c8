"""Balancing of codes on points that crowd around few of them."""

import pytest
import torch

from mmesid.trainer.quantizer.sinkhorn import sinkhorn_offsets
from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances


def crowded() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    points, codes = torch.randn(800, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return pairwise_squared_distances(points + codes[0] * (torch.rand(800, 1, generator=generator) < 0.7), codes)


def counts(costs: torch.Tensor) -> torch.Tensor:
    return torch.bincount(costs.argmin(1), minlength=costs.shape[1])


def test_offsets_spread_points_evenly_also_those_that_they_were_not_found_from():
    squared = crowded()
    offsets = sinkhorn_offsets(squared[::2], epsilon=0.01, iterations=200)
    assert counts(squared).max() > 200 and counts(squared).min() < 40
    assert counts((squared - offsets)[::2]).max() < 56 and counts((squared - offsets)[::2]).min() > 44
    assert counts((squared - offsets)[1::2]).max() < 80 and counts((squared - offsets)[1::2]).min() > 25
    # A hot temperature balances less.
    assert counts(squared - sinkhorn_offsets(squared, epsilon=10.0)).max() > counts(squared - offsets).max()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_offsets_are_in_the_unit_of_the_distances_and_finite_for_a_code_out_of_reach(scale):
    squared = crowded()
    squared[:, 3] = 1e4
    offsets = sinkhorn_offsets(squared, 0.003)
    assert offsets.isfinite().all()
    torch.testing.assert_close(sinkhorn_offsets(squared * scale, 0.003), offsets * scale, rtol=1e-3, atol=0)

"""Sinkhorn's algorithm, which spreads points evenly over codes."""

import math

import torch


def sinkhorn_offsets(squared_distances: torch.Tensor, epsilon: float, iterations: int = 50) -> torch.Tensor:
    r"""The potentials \\(g_k\\), `(codes,)`, of the entropic optimal transport of points to codes of equal mass, from
    `squared_distances` `(points, codes)`: \\(\operatorname{argmin}_k (d_{ik}^2 - g_k)\\) sends about equally many
    points to every code, whichever points are asked for together. The temperature `epsilon` is relative to the mean of
    the distances; the smaller, the more even."""
    scale = squared_distances.mean().clamp_min(torch.finfo(squared_distances.dtype).tiny) * epsilon
    affinities = -squared_distances / scale
    points, codes = affinities.shape
    potentials = affinities.new_zeros(codes)
    for _ in range(iterations):
        shares = affinities + potentials
        shares -= shares.logsumexp(1, keepdim=True) + math.log(points)
        # Every code is to receive 1 / codes of the mass.
        potentials = potentials - shares.logsumexp(0) - math.log(codes)
        # A code that is out of reach of every point must not end at infinity.
        potentials = potentials.clamp(-1 / epsilon, 1 / epsilon)
    return potentials * scale

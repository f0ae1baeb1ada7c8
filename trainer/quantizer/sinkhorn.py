"""Sinkhorn's algorithm, which spreads points evenly over codes."""

import math

import torch


def sinkhorn_offsets(squared_distances: torch.Tensor, epsilon: float, iterations: int = 50) -> torch.Tensor:
    r"""
    The potentials \\(g_k\\) of the entropic optimal transport of points to codes of equal mass: with them,
    \\(\operatorname{argmin}_k (d_{ik}^2 - g_k)\\) sends about equally many points to every code, whichever points are
    asked for together.

    Args:
        squared_distances (`torch.Tensor` of shape `(points, codes)`): Squared distances of the points to the codes.
        epsilon (`float`): Temperature, relative to the mean of `squared_distances`; the smaller, the more even.
        iterations (`int`, *optional*, defaults to 50): Updates of the potentials.

    Returns:
        `torch.Tensor` of shape `(codes,)`, in the unit of `squared_distances`.
    """
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

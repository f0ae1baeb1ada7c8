"""Lloyd's k-means on tensors, for code vectors to start from."""

import torch

from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances


CHUNK_SIZE = 16_384
ITERATIONS = 25


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index `(n,)` of and squared distance `(n,)` to the nearest of `centroids` `(k, d)` for each of `points` `(n,
    d)`."""
    found = [pairwise_squared_distances(chunk, centroids).min(1) for chunk in points.split(CHUNK_SIZE)]
    return torch.cat([minimum.indices for minimum in found]), torch.cat([minimum.values for minimum in found])


def kmeans(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Centroids `(clusters, d)` of `points` `(n, d)` by Lloyd's algorithm, started as in k-means++. A cluster that
    runs empty moves to one of the points that are farthest from their centroids."""
    if len(points) < clusters:
        raise ValueError(
            f"k-means needs at least as many points as clusters, got {len(points)} points for {clusters} clusters."
        )
    centroids = _spread_points(points, clusters, generator)
    for _ in range(ITERATIONS):
        assignment, distances = nearest(points, centroids)
        counts = torch.bincount(assignment, minlength=clusters)
        sums = torch.zeros_like(centroids).index_add_(0, assignment, points)
        centroids = sums / counts.clamp_min(1).to(sums.dtype)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centroids[empty] = points[distances.topk(len(empty)).indices]
    return centroids


def _spread_points(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Points drawn one by one, with a probability in proportion to the squared distance to those drawn before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distances = torch.full_like(points[:, 0], torch.inf)
    for _ in range(clusters - 1):
        latest = points[chosen[-1]][None]
        distances = torch.minimum(distances, nearest(points, latest)[1])
        # On the CPU and in float64, so that the draw is the same everywhere and no sum of small numbers is lost.
        cumulated = distances.double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulated[-1]
        chosen.append(min(int(torch.searchsorted(cumulated, draw, right=True)), len(points) - 1))
    return points[chosen].clone()

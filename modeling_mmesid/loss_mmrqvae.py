"""The losses of the quantizer: pure functions of tensors."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


# The published MMD has five Gaussian kernels, each twice as wide as the one before.
KERNELS = 5
KERNEL_FACTOR = 2.0


def pairwise_squared_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances `(n, m)` between the rows of `left` `(n, d)` and `right` `(m, d)`, from one matrix
    product."""
    squares = left.square().sum(-1)[:, None] + right.square().sum(-1)[None]
    return torch.addmm(squares, left, right.T, alpha=-2).clamp_min(0)


def mean_squared_error(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of `left` and `right`, both `(n, d)`, a scalar in float32; 0 if there is no row."""
    return (left.float() - right.float()).square().sum() / max(left.numel(), 1)


def _kernel_sums(block: torch.Tensor, points: torch.Tensor, signs: torch.Tensor, bandwidth: torch.Tensor):
    kernel = torch.exp(pairwise_squared_distances(block, points) / (-bandwidth * KERNEL_FACTOR ** (KERNELS - 1)))
    total = kernel @ signs
    for _ in range(KERNELS - 1):
        # The next narrower kernel is a power of this one, which is cheaper than another exponential.
        kernel = kernel.pow(KERNEL_FACTOR)
        total = total + kernel @ signs
    return total


def mmd(source: torch.Tensor, target: torch.Tensor, block_size: int = 1024) -> torch.Tensor:
    r"""
    Squared maximum mean discrepancy between two sets under a sum of five Gaussian kernels, in the biased estimate
    \\(\overline{k(x, x')} + \overline{k(y, y')} - 2 \overline{k(x, y)}\\).

    `source` is `(n, d)`, `target` `(m, d)`; a scalar in float32, 0 if either set is empty. The kernels' bandwidths are
    a factor of two apart, around the mean squared distance between the points of both sets together, which is a
    constant to the gradient. Kernels are computed `block_size` rows at a time, and again in the backward pass: memory
    is `block_size * (n + m)` for the kernels and `(n + m) * d` for the points.
    """
    n, m = source.shape[0], target.shape[0]
    with torch.autocast(source.device.type, enabled=False):
        points = torch.cat([source, target]).float()
        if n == 0 or m == 0:
            return points.sum() * 0.0
        # The kernels do not change under a common shift, and small numbers keep the products exact.
        points = points - points.detach().mean(0)
        with torch.no_grad():
            # The sum of all pairwise squared distances of centred points is 2 * count * sum of squares.
            bandwidth = 2 * points.square().sum() / (n + m - 1)
            bandwidth = bandwidth.clamp_min(torch.finfo(torch.float32).tiny) / KERNEL_FACTOR ** (KERNELS // 2)
        signs = torch.cat([points.new_full((n,), 1.0 / n), points.new_full((m,), -1.0 / m)])
        sums = [
            checkpoint(_kernel_sums, block, points, signs, bandwidth, use_reentrant=False)
            for block in points.split(block_size)
        ]
        return signs @ torch.cat(sums)


def info_nce(anchor: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric in-batch InfoNCE between two views `(n, d)` of the same items: the mean of the cross-entropies of
    finding an item's other view among all, in both directions, by cosine similarity over the temperature. A scalar in
    float32; 0 if there is no item."""
    with torch.autocast(anchor.device.type, enabled=False):
        anchor = nn.functional.normalize(anchor.float(), dim=-1)
        other = nn.functional.normalize(other.float(), dim=-1)
        if anchor.shape[0] == 0:
            return (anchor.sum() + other.sum()) * 0.0
        logits = anchor @ other.T / temperature
        answers = torch.arange(logits.shape[0], device=logits.device)
        return (nn.functional.cross_entropy(logits, answers) + nn.functional.cross_entropy(logits.T, answers)) / 2


def _near_weights(distances: torch.Tensor, focus: float) -> torch.Tensor:
    r"""
    What the distances `(n, n)` of each item to the others weigh, every row summing to 1: \\(\exp(-focus \cdot z)\\),
    where z is the distance in standard deviations above the item's mean, and 0 where an item meets itself. Near items,
    which a sequence is made of, count for more than the many far ones.
    """
    others = 1 - torch.eye(len(distances), device=distances.device)
    count = len(distances) - 1
    mean = (distances * others).sum(1, keepdim=True) / count
    deviation = ((distances - mean).square() * others).sum(1, keepdim=True).div(count).sqrt().clamp_min(1e-12)
    # Near duplicates, many deviations below the mean, must not take the whole weight.
    weights = torch.exp(-focus * ((distances - mean) / deviation).clamp_min(-3)) * others
    return weights / weights.sum(1, keepdim=True)


def distance_correlation_loss(embeddings: torch.Tensor, quantized: torch.Tensor, focus: float = 1.0) -> torch.Tensor:
    """One minus the mean, over the items of a batch, of the weighted correlation between an item's distances to the
    others in `embeddings` `(n, D)` and `quantized` `(n, d)`; `focus` as in [`MMRQVAEConfig`]. A scalar in float32
    between 0 and 2, which does not change when the quantized space is scaled; 0 for fewer than three items, which have
    nothing to correlate."""
    n = embeddings.shape[0]
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings, quantized = embeddings.float(), quantized.float()
        if n < 3:
            return quantized.sum() * 0.0
        with torch.no_grad():
            before = pairwise_squared_distances(embeddings, embeddings).sqrt()
            weights = _near_weights(before, focus)
            before = before - (weights * before).sum(1, keepdim=True)
            before = before / (weights * before.square()).sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        squared = pairwise_squared_distances(quantized, quantized)
        # The shift keeps the root differentiable for two items that share all their codes.
        after = (squared + 1e-4 * squared.detach().mean() + 1e-12).sqrt()
        after = after - (weights * after).sum(1, keepdim=True)
        spread = (weights * after.square()).sum(1).clamp_min(1e-12).sqrt()
        return 1 - ((weights * before * after).sum(1) / spread).mean()

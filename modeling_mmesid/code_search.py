"""The search for the codes of an item whose distances to known items, the anchors, follow those of its embedding."""

import torch

from .loss_mmrqvae import pairwise_squared_distances, stress_weights


# Numbers held at a time for the distances of items to anchors: 16 MiB in float32.
BLOCK_NUMBERS = 2**22


@torch.no_grad()
def nearest_anchors(embeddings: torch.Tensor, anchors: torch.Tensor, count: int = 1) -> torch.LongTensor:
    """
    Indices `(n, count)` of the nearest of `anchors` `(m, D)` to each of `embeddings` `(n, D)`, nearest first; of
    `count` or, where there are fewer, all of them.
    """
    count = min(count, len(anchors))
    with torch.autocast(embeddings.device.type, enabled=False):
        blocks = embeddings.float().split(max(BLOCK_NUMBERS // len(anchors), 1))
        found = [
            pairwise_squared_distances(block, anchors.float()).topk(count, largest=False).indices for block in blocks
        ]
    return torch.cat(found)


@torch.no_grad()
def search_codes(
    embeddings: torch.Tensor,
    start: torch.LongTensor,
    anchors: torch.Tensor,
    anchor_vectors: torch.Tensor,
    codebooks: torch.Tensor,
    offset: torch.Tensor,
    focus: float,
    sweeps: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    r"""
    Coordinate descent on the stress of each item to the anchors ([`~loss_mmrqvae.stress_loss`]): level after level, an
    item takes the code of least stress given its other codes, `sweeps` times.

    With r the sum of the item's other code vectors, \\(e_a = \lVert r - q_a \rVert^2 + offset - \lVert x - x_a
    \rVert^2\\) its errors now, w_a their weights, and \\(c_k = 2 r v_k + \lVert v_k \rVert^2\\), code k makes the
    stress \\(\sum_a w_a (e_a + c_k - 2 v_k q_a)^2\\). That of all codes of a level comes from products with
    \\(\sum_a w_a q_a\\) and \\(\sum_a w_a e_a q_a\\), and one with \\((v_k q_a)^2\\) that serves every sweep: an item
    costs about `anchors * levels * (codes + 2 * sweeps * d)` multiplications.

    Args:
        embeddings (`torch.Tensor` of shape `(n, D)`): Embeddings of the items.
        start (`torch.LongTensor` of shape `(n, levels)`): Codes to start from.
        anchors (`torch.Tensor` of shape `(m, D)`): Embeddings of the anchors.
        anchor_vectors (`torch.Tensor` of shape `(m, d)`): Quantized vectors of the anchors.
        codebooks (`torch.Tensor` of shape `(levels, codes, d)`): The code vectors.
        offset (`torch.Tensor` of shape `()`): The additive constant of the stress.
        focus (`float`): How much more near anchors count.
        sweeps (`int`): Passes over the levels, at least one.

    Returns:
        `tuple[torch.LongTensor, torch.Tensor]`: Codes `(n, levels)`, and the stress that they leave, `(n,)`.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        anchors, anchor_vectors, codebooks = anchors.float(), anchor_vectors.float(), codebooks.float()
        products = [(codebook @ anchor_vectors.T).square() for codebook in codebooks]
        rows = max(BLOCK_NUMBERS // len(anchors), 1)
        found = [
            _search_block(block, codes, anchors, anchor_vectors, codebooks, products, offset.float(), focus, sweeps)
            for block, codes in zip(embeddings.float().split(rows), start.split(rows))
        ]
    return torch.cat([codes for codes, _ in found]), torch.cat([stress for _, stress in found])


def _search_block(embeddings, start, anchors, anchor_vectors, codebooks, products, offset, focus, sweeps):
    before = pairwise_squared_distances(embeddings, anchors)
    weights, variance = stress_weights(before, focus)
    lengths = anchor_vectors.square().sum(1)
    weighted = weights @ anchor_vectors
    # The part of the stress that no other code of the item changes.
    own = [4 * weights @ product.T for product in products]
    codes = start.clone()
    total = sum(codebook[codes[:, level]] for level, codebook in enumerate(codebooks))
    for _ in range(sweeps):
        for level, codebook in enumerate(codebooks):
            rest = total - codebook[codes[:, level]]
            errors = torch.addmm(lengths + offset - before, rest, anchor_vectors.T, alpha=-2)
            errors += rest.square().sum(1, keepdim=True)
            weighted_errors = weights * errors
            shift = 2 * rest @ codebook.T + codebook.square().sum(1)
            costs = own[level] - 4 * (weighted_errors @ anchor_vectors) @ codebook.T
            costs += shift * (2 * weighted_errors.sum(1, keepdim=True) - 4 * weighted @ codebook.T + shift)
            least, codes[:, level] = costs.min(1)
            total = rest + codebook[codes[:, level]]
    return codes, ((weighted_errors * errors).sum(1) + least) / variance

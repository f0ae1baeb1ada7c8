"""Semantic IDs that no two items share."""

import torch

from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances


def shared(codes: torch.Tensor) -> torch.Tensor:
    """Which rows of `codes` `(items, num_quantizers)` equal an earlier one."""
    _, owners = torch.unique(codes, dim=0, return_inverse=True)
    order = owners.argsort(stable=True)
    later = torch.zeros(len(codes), dtype=torch.bool)
    later[order[1:]] = owners[order[1:]] == owners[order[:-1]]
    return later


def resolve_collisions(codes: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor, vectors: torch.Tensor) -> None:
    """Moves the items `rows` `(moved,)` of `codes` `(items, num_quantizers)`, in place, to the nearest free ID:
    another code at the last level, and where all of them are taken, another one at the level before as well. `latents`
    are `(moved, codebook_dim)`, the code `vectors` `(num_quantizers, codebook_size, codebook_dim)`."""
    taken = {tuple(values) for values in codes.tolist()}
    for row, latent in zip(rows.tolist(), latents):
        *prefix, _ = codes[row].tolist()
        for moved in _candidates(tuple(prefix), latent, vectors):
            if moved not in taken:
                break
        else:
            raise ValueError(
                f"The items that share the codes {prefix[:-1]} with row {row} take all IDs that begin so; "
                "set a larger codebook_size or num_quantizers, or resolve_collisions to false."
            )
        taken.add(moved)
        codes[row] = torch.tensor(moved, dtype=codes.dtype)


def _candidates(prefix: tuple[int, ...], latent: torch.Tensor, vectors: torch.Tensor):
    """IDs that begin as `prefix`, nearest first; then those that differ from it in its last code."""
    residual = latent - sum((vectors[level, code] for level, code in enumerate(prefix)), torch.zeros_like(latent))
    yield from ((*prefix, code) for code in _nearest_first(residual, vectors[-1]))
    if prefix:
        before = residual + vectors[-2, prefix[-1]]
        for code in _nearest_first(before, vectors[-2]):
            last = _nearest_first(before - vectors[-2, code], vectors[-1])
            yield from ((*prefix[:-1], code, final) for final in last)


def _nearest_first(point: torch.Tensor, vectors: torch.Tensor) -> list[int]:
    return pairwise_squared_distances(point[None], vectors)[0].argsort(stable=True).tolist()

"""What of a quantizer is fitted without a gradient: before the training the scale of the inputs, projections, code
vectors and linear decoders; after each epoch the codes that nothing chooses and the balance of the others."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_mmesid.configuration_mmrqvae import USUAL_CODEBOOK_SIZE
from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEBranch, MMRQVAEModel, MMRQVAEVectorQuantization

from .items import READ_ITEMS, ItemTables
from .kmeans import kmeans
from .sinkhorn import sinkhorn_offsets


# The k-means looks at this many items per code at most, and at no more than 2^26 numbers: more do not move the code
# vectors, and the latents of a large catalogue would not fit.
KMEANS_ITEMS = 256
KMEANS_NUMBERS = 2**26
BALANCING_ITEMS = 8_192
ITEMS_PER_USUAL_CODE = 8
# What is proposed instead of a codebook that is too large.
ITEMS_PER_CODE = 4
# Directions that code vectors hardly use are decided by few items; this share of the mean square keeps them small.
RIDGE = 1e-2


def usual_codebook_size(num_items: int) -> int:
    """The codes of a level that a catalogue gets unless the settings say otherwise."""
    return min(2 ** int(math.log2(max(num_items / ITEMS_PER_USUAL_CODE, 2))), USUAL_CODEBOOK_SIZE)


@torch.no_grad()
def initialize(model: MMRQVAEModel, dataset: ItemTables, seed: int = 0) -> None:
    """Fits the mean and the scale of the inputs, the principal directions as the projection of encoders that have one,
    the code vectors by k-means of what the levels before leave, the offsets of balanced levels, and linear decoders by
    least squares, for each modality to the items that have it."""
    config = model.config
    model.eval()
    anchor = config.modalities[0]
    for modality, branch in model.branches.items():
        rows = dataset.rows_with(modality)
        _require_enough(modality, len(rows), config.codebook_size)
        directions = _fit_inputs(branch, dataset, modality, rows)
        if config.encoder_projection:
            kept = directions[: config.codebook_dim]
            if modality != anchor:
                kept = _turn(kept, model, dataset, modality, anchor)
            # Where the latent is wider than the embedding, the rows below are zero.
            branch.encoder.projection.zero_()
            branch.encoder.projection[: len(kept)] = kept
        generator = torch.Generator().manual_seed(seed)
        _fit_codebooks(branch, dataset, modality, config.sinkhorn_epsilons, generator)
        if config.encoder_projection:
            fit_linear_decoder(branch, dataset, modality)


def _require_enough(modality: str, count: int, codebook_size: int) -> None:
    if count < codebook_size:
        enough = 2 ** int(math.log2(max(count / ITEMS_PER_CODE, 2)))
        remedy = f"set codebook_size to {enough}, say"
        if count < 2:
            remedy = "prepare more items that have it, or leave the modality out"
        raise ValueError(
            f"{count} items to train on, besides those held out, have the modality '{modality}', fewer than the "
            f"{codebook_size} codes of a level; {remedy}."
        )


def _fit_inputs(branch: MMRQVAEBranch, dataset: ItemTables, modality: str, rows: torch.Tensor) -> torch.Tensor:
    """Sets the inputs' mean and scale, and returns the principal directions, `(embedding_dim, embedding_dim)`, those
    of most variance first."""
    device = branch.input_mean.device
    mean = torch.zeros_like(branch.input_mean, dtype=torch.float64)
    for batch in dataset.read(modality, rows, device):
        mean += batch.double().sum(0)
    mean /= len(rows)
    if not mean.isfinite().all():
        raise ValueError(f"The embeddings of '{modality}' hold NaN or infinity; encode these items again.")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for batch in dataset.read(modality, rows, device):
        centred = batch.double() - mean
        covariance += centred.T @ centred / len(rows)
    branch.input_mean.copy_(mean)
    branch.input_scale.copy_((covariance.trace() / len(covariance)).sqrt().clamp_min(1e-12))
    return torch.linalg.eigh(covariance).eigenvectors.flip(1).T.to(branch.input_mean.dtype)


def _turn(
    projection: torch.Tensor, model: MMRQVAEModel, dataset: ItemTables, modality: str, anchor: str
) -> torch.Tensor:
    """The projection `(directions, embedding_dim)` of a modality turned towards the anchor's, which no distance within
    the modality notices: `(codebook_dim, embedding_dim)`."""
    both = dataset.rows_with(anchor, modality)
    if len(both) == 0:
        return projection
    branch, anchor_branch = model.branches[modality], model.branches[anchor]
    products = 0
    for left, right in zip(
        dataset.read(anchor, both, model.device), dataset.read(modality, both, model.device), strict=True
    ):
        left = nn.functional.linear(anchor_branch.standardize(left), anchor_branch.encoder.projection)
        right = nn.functional.linear(branch.standardize(right), projection)
        products = products + left.double().T @ right.double()
    left, _, right = torch.linalg.svd(products, full_matrices=False)
    return (left @ right).to(projection.dtype) @ projection


def _fit_codebooks(
    branch: MMRQVAEBranch, dataset: ItemTables, modality: str, epsilons: Sequence[float], generator: torch.Generator
) -> None:
    """Sets the code vectors level by level, each by k-means of what the levels before leave."""
    codebook_size, codebook_dim = branch.quantizer.layers[0].codebook.shape
    rows = dataset.rows_with(modality)
    limit = max(min(KMEANS_ITEMS * codebook_size, KMEANS_NUMBERS // codebook_dim), codebook_size)
    if len(rows) > limit:
        rows = rows[torch.randperm(len(rows), generator=generator)[:limit].sort().values]
    residual = _latents(branch, dataset, modality, rows)
    levels = zip(branch.quantizer.layers, epsilons, strict=True)
    for layer, epsilon in tqdm(levels, total=len(epsilons), desc=f"k-means of {modality}", unit="level", delay=2):
        layer.codebook.copy_(kmeans(residual, codebook_size, generator))
        _balance_level(layer, residual, epsilon)
        for part in residual.split(READ_ITEMS):
            part -= layer.decode(layer.encode(part))


def _latents(branch: MMRQVAEBranch, dataset: ItemTables, modality: str, rows: torch.Tensor) -> torch.Tensor:
    """Latents `(rows, codebook_dim)` of some items."""
    return torch.cat([branch.latents(batch) for batch in dataset.read(modality, rows, branch.input_mean.device)])


def fit_linear_decoder(branch: MMRQVAEBranch, dataset: ItemTables, modality: str) -> None:
    """Sets the decoder to the linear one of the least squared error on the dataset's items that have the modality."""
    (decoder,) = branch.decoder
    width = decoder.in_features
    vectors = torch.cat([layer.codebook for layer in branch.quantizer.layers]).float()
    # The solution lies in the span of the code vectors, which may be far smaller than a wide space.
    basis = torch.linalg.qr(vectors.T).Q if len(vectors) < width else None
    # One more for the bias.
    size = 1 + (width if basis is None else basis.shape[1])
    gram = torch.zeros(size, size, dtype=torch.float64, device=vectors.device)
    products = torch.zeros(size, decoder.out_features, dtype=torch.float64, device=vectors.device)
    for batch in dataset.read(modality, dataset.rows_with(modality), vectors.device):
        quantized = branch.quantizer.decode(branch.encode(batch))
        if basis is not None:
            quantized = quantized @ basis
        inputs = torch.cat([quantized, torch.ones_like(quantized[:, :1])], 1).double()
        gram += inputs.T @ inputs
        products += inputs.T @ branch.standardize(batch).double()
    ridge = RIDGE * gram.trace() / (width + 1)
    solution = torch.linalg.solve(gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device), products)
    weight = solution[:-1].T
    decoder.weight.copy_(weight if basis is None else weight.to(basis.dtype) @ basis.T)
    decoder.bias.copy_(solution[-1])


@torch.no_grad()
def balance_codes(branch: MMRQVAEBranch, dataset: ItemTables, modality: str, epsilons: Sequence[float]) -> None:
    """Sets the offsets of the levels whose epsilon is not 0, from evenly spaced items of the dataset."""
    if not any(epsilons):
        return
    rows = dataset.rows_with(modality)
    residual = _latents(branch, dataset, modality, rows[:: math.ceil(max(len(rows), 1) / BALANCING_ITEMS)])
    for layer, epsilon in zip(branch.quantizer.layers, epsilons, strict=True):
        _balance_level(layer, residual, epsilon)
        residual = residual - layer.decode(layer.encode(residual))


def _balance_level(layer: MMRQVAEVectorQuantization, residual: torch.Tensor, epsilon: float) -> None:
    """Sets the offsets that spread a level's residuals evenly over its codes."""
    if epsilon > 0:
        step = math.ceil(len(residual) / BALANCING_ITEMS)
        squared = pairwise_squared_distances(residual[::step].float(), layer.codebook.float())
        layer.offsets.copy_(sinkhorn_offsets(squared, epsilon))


@torch.no_grad()
def revive_codes(
    branch: MMRQVAEBranch, dataset: ItemTables, modality: str, dead: torch.Tensor, generator: torch.Generator
) -> None:
    """Moves the `dead` code vectors `(num_quantizers, codebook_size)` to what random items leave to their level."""
    if not dead.any():
        return
    rows = dataset.rows_with(modality)
    chosen = rows[torch.randint(len(rows), (int(dead.sum(1).max()),), generator=generator)]
    residual = _latents(branch, dataset, modality, chosen)
    for layer, codes in zip(branch.quantizer.layers, dead, strict=True):
        # The next level sees residuals from before the move: after it, nothing would be left of these items.
        rest = residual - layer.decode(layer.encode(residual))
        layer.codebook[codes] = residual[: int(codes.sum())].to(layer.codebook.dtype)
        residual = rest

"""What the quantizer starts from, which needs no gradient: scale of the inputs, projection, code vectors, decoder."""

import math

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEAnchorBranch, MMRQVAEModel

from .items import ENCODING_BATCH, ItemTables, read_batches
from .kmeans import kmeans
from .sinkhorn import sinkhorn_offsets


# The k-means looks at this many items a code at most, and at no more than 2^26 numbers: more do not move the code
# vectors, and the latents of a large catalogue would not fit.
KMEANS_ITEMS = 256
KMEANS_NUMBERS = 2**26
BALANCING_ITEMS = 8_192


@torch.no_grad()
def initialize(model: MMRQVAEModel, dataset: ItemTables, seed: int = 0) -> None:
    """
    Fits what needs no gradient: the inputs' mean and scale, the principal directions as the projection of encoders
    that have one, the code vectors by k-means of what the levels before leave, the offsets of balanced levels, the
    anchors of the objective `"stress"`, and linear decoders by least squares. Tables are read batch by batch; the
    k-means looks at 256 random items a code where there are more.

    Args:
        model ([`MMRQVAEModel`]): Changed in place.
        dataset ([`ItemTables`]): The items to learn from; those that lack a modality do not count in it.
        seed (`int`, *optional*, defaults to 0): Seed of the k-means.

    Raises:
        ValueError: If fewer items than `config.codebook_size` or `config.num_anchors` have some modality.
    """
    config: MMRQVAEConfig = model.config
    model.eval()
    anchor_modality = config.modalities[0]
    projections = {}
    for modality in config.modalities:
        generator = torch.Generator().manual_seed(seed)
        branch = model.branches[modality]
        rows = dataset.rows_with(modality)
        _require_enough(config, modality, len(rows))
        directions = _fit_inputs(branch, dataset, modality, rows)
        projections[modality] = _projection(directions, config.codebook_dim)
        if modality != anchor_modality and (config.objective == "stress" or config.encoder_projection):
            projections[modality] = _turned(projections, anchor_modality, modality, model, dataset)
        searches = isinstance(branch, MMRQVAEAnchorBranch)
        if not searches and branch.projects:
            branch.projection.copy_(projections[modality])

        def latents(batch, branch=branch, projection=projections[modality], searches=searches):
            inputs = branch.standardize(batch)
            return nn.functional.linear(inputs, projection) if searches else branch.latents(inputs)

        sample = rows
        limit = max(min(KMEANS_ITEMS * config.codebook_size, KMEANS_NUMBERS // config.codebook_dim), 1)
        if len(rows) > limit:
            chosen = torch.randperm(len(rows), generator=generator)[: max(limit, config.codebook_size)]
            sample = rows[chosen.sort().values]
        residual = torch.cat([latents(batch) for batch in read_batches(branch, dataset, modality, sample)])
        levels = zip(branch.quantizer.layers, config.sinkhorn_epsilons)
        for layer, epsilon in tqdm(
            levels, total=config.num_quantizers, desc=f"k-means of {modality}", unit="level", delay=2
        ):
            layer.codebook.copy_(kmeans(residual, config.codebook_size, generator))
            balance(layer, residual, epsilon)
            for part in residual.split(ENCODING_BATCH):
                part -= layer.decode(layer.encode(part))
        if searches:
            _fit_anchors(branch, dataset, modality, latents, generator)
        if config.objective == "stress" or config.encoder_projection:
            batches = read_batches(branch, dataset, modality, rows)
            codes = torch.cat([branch.quantizer.encode(latents(batch)) for batch in batches])
            fit_linear_decoder(branch, dataset, modality, codes)


def _require_enough(config: MMRQVAEConfig, modality: str, count: int) -> None:
    if count < config.codebook_size:
        raise ValueError(
            f"{count} items to train on have the modality '{modality}', "
            f"fewer than the {config.codebook_size} codes of a level; "
            f"set codebook_size to {2 ** max(int(math.log2(max(count, 2))) - 2, 1)} or less."
        )
    if config.objective == "stress" and count < config.num_anchors:
        raise ValueError(
            f"{count} items to train on have the modality '{modality}', fewer than the {config.num_anchors} anchors; "
            f"set num_anchors to {count} or less."
        )


def _fit_inputs(branch, dataset: ItemTables, modality: str, rows: torch.LongTensor) -> torch.Tensor:
    """Sets the inputs' mean and scale, and returns the principal directions, `(embedding_dim, embedding_dim)`, those
    of most variance first."""
    total = sum(batch.double().sum(0) for batch in read_batches(branch, dataset, modality, rows))
    mean = total / len(rows)
    covariance = 0
    for batch in read_batches(branch, dataset, modality, rows):
        centred = batch.double() - mean
        covariance = covariance + centred.T @ centred / len(rows)
    branch.input_mean.copy_(mean)
    width = branch.width if isinstance(branch, MMRQVAEAnchorBranch) else len(covariance)
    branch.input_scale.copy_((covariance.trace() / width).sqrt().clamp_min(1e-12))
    return torch.linalg.eigh(covariance).eigenvectors.flip(1).T.to(branch.input_mean.dtype)


def _projection(directions: torch.Tensor, width: int) -> torch.Tensor:
    """An orthogonal projection `(width, embedding_dim)`: distances survive a rotation, and where the latent is
    narrower than the embedding, the directions of least variance go."""
    projection = directions.new_zeros(width, directions.shape[1])
    kept = min(projection.shape)
    projection[:kept] = directions[:kept]
    return projection


def _turned(
    projections: dict[str, torch.Tensor], anchor: str, modality: str, model: MMRQVAEModel, dataset: ItemTables
) -> torch.Tensor:
    """The projection of a modality turned towards the anchor's, which no distance within the modality notices."""
    both = dataset.rows_with(anchor)
    both = both[dataset.present[modality][both]]
    if len(both) == 0:
        return projections[modality]
    parts = {name: read_batches(model.branches[name], dataset, name, both) for name in (anchor, modality)}
    # Below these rows the projection is zero: a latent wider than the embedding does not fill.
    projection = projections[modality][: projections[modality].shape[1]]
    products = 0
    for left, right in zip(parts[anchor], parts[modality]):
        left = nn.functional.linear(model.branches[anchor].standardize(left), projections[anchor])
        right = nn.functional.linear(model.branches[modality].standardize(right), projection)
        products = products + left.double().T @ right.double()
    left, _, right = torch.linalg.svd(products, full_matrices=False)
    return (left @ right).to(projection.dtype) @ projection


def balance(layer, residual: torch.Tensor, epsilon: float) -> None:
    """Sets the offsets that spread a level's residuals evenly over its codes."""
    if epsilon > 0 and len(residual):
        step = math.ceil(len(residual) / BALANCING_ITEMS)
        squared = pairwise_squared_distances(residual[::step].float(), layer.codebook.float())
        layer.offsets.copy_(sinkhorn_offsets(squared, epsilon))


def _fit_anchors(
    branch: MMRQVAEAnchorBranch, dataset: ItemTables, modality: str, latents, generator: torch.Generator
) -> None:
    """Keeps the anchors with the codes that are nearest to their latents, and what quantization takes from their
    distances. Anchors are drawn by the weights of the items, without replacement, and stand in the order drawn: the
    first of them, to which a search is confined, are a sample of all."""
    rows = dataset.rows_with(modality)
    # The smallest of exponential waiting times are such a sample (Efraimidis and Spirakis, 2006).
    waits = torch.empty(len(rows), dtype=torch.float64).exponential_(generator=generator) / dataset.weights[rows]
    rows = rows[waits.argsort()[: len(branch.anchors)]]
    batches = list(read_batches(branch, dataset, modality, rows))
    branch.anchors.copy_(torch.cat([branch.standardize(batch) for batch in batches]))
    branch.anchor_codes.copy_(torch.cat([branch.quantizer.encode(latents(batch)) for batch in batches]))
    # The mean squared distance is twice the variance.
    before, after = branch.anchors, branch.quantizer.decode(branch.anchor_codes)
    branch.offset.copy_(2 * (before.var(0, correction=0).sum() - after.var(0, correction=0).sum()) / branch.width)


def fit_linear_decoder(branch, dataset: ItemTables, modality: str, codes: torch.Tensor) -> None:
    """The decoder that makes the least squared error of all linear ones, given the codes of the dataset's items that
    have the modality."""
    gram = products = 0
    rows = dataset.rows_with(modality)
    width = branch.decoder[0].in_features
    vectors = torch.cat([layer.codebook for layer in branch.quantizer.layers]).float()
    # The solution lies in the span of the code vectors, which a wide space is far from filled by.
    basis = torch.linalg.qr(vectors.T).Q if len(vectors) < width else None
    for part, batch in zip(codes.split(ENCODING_BATCH), read_batches(branch, dataset, modality, rows)):
        quantized = branch.quantizer.decode(part.to(batch.device))
        if basis is not None:
            quantized = quantized @ basis
        inputs = torch.cat([quantized, torch.ones_like(quantized[:, :1])], 1).double()
        gram = gram + inputs.T @ inputs
        products = products + inputs.T @ branch.standardize(batch).double()
    # The ridge keeps directions that code vectors hardly use small, which few items would decide.
    ridge = 1e-2 * gram.trace() / (width + 1)
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), products)
    weight = solution[:-1].T
    branch.decoder[0].weight.copy_(weight if basis is None else weight.to(basis.dtype) @ basis.T)
    branch.decoder[0].bias.copy_(solution[-1])

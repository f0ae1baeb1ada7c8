"""Training of the quantizer: tables of embeddings as a dataset, initialisation, revival of dead codes, evaluation on
held-out items."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.utils import logging

from mmesid.hub_cards.figures import draw_code_use, draw_distances
from modeling_mmesid.code_search import nearest_anchors
from modeling_mmesid.configuration_mmrqvae import MMRQVAEConfig
from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEAnchorBranch, MMRQVAEModel

from ..data.prepared import PreparedDataset
from ..metrics.codes.codes import code_health
from ..metrics.forgetting.forgetting import mean_tau, pooled_tau
from ..publishing.hub_trainer import HubTrainerMixin
from ..running.arguments import QuantizeArguments
from .collisions import resolve_collisions, shared
from .kmeans import kmeans
from .semantic_ids import SEMANTIC_IDS_NAME, semantic_id_examples, write_semantic_ids
from .sinkhorn import sinkhorn_offsets


logger = logging.get_logger(__name__)

ENCODING_BATCH = 8_192
# The k-means looks at this many items a code at most, and at no more than 2^26 numbers: more do not move the code
# vectors, and the latents of a large catalogue would not fit.
KMEANS_ITEMS = 256
KMEANS_NUMBERS = 2**26
BALANCING_ITEMS = 8_192
# Held-out items are at most so many: what the model makes of them is held until the end of the evaluation.
HELD_OUT_ITEMS = 10_000
# Code vectors that the distances move take larger steps than those that follow residuals.
CODEBOOK_LEARNING_RATES = {"stress": 4e-2, "distance": 1e-2}
# Anchors, drawn anew every epoch, to which training measures the stress of an item: codes must not fit a few by heart.
TRAINING_ANCHORS = 1_024
# Odd, so that no level of an ID is shifted out of its hash.
HASH_FACTOR = 6_364_136_223_846_793_005
ABSENT = torch.iinfo(torch.int64).min
# Held-out items whose distances are compared, to how many others each, of how many of the training set: evaluation
# takes a second, whatever the catalogue.
TAU_ITEMS = 512
TAU_OTHERS = 128
TAU_POOL = 4_096


class ItemTables(Dataset):
    """
    Rows of embedding tables, read a batch at a time.

    Args:
        embeddings (`dict[str, torch.Tensor]` of shape `(items + 1, embedding_dim)` a modality): Tables indexed by row.
        present (`dict[str, torch.BoolTensor]` of shape `(items + 1,)` a modality): Which items have the modality.
        rows (`torch.LongTensor` of shape `(selected,)`, *optional*):
            The rows that make up the dataset. Defaults to every item that has some modality; never the padding row 0.
        weights (`torch.Tensor` of shape `(items + 1,)`, *optional*): How often an item is drawn, to learn from and as
            an anchor, in proportion, for the objective `"stress"`. Defaults to all alike.

    Attributes:
        codes (`dict[str, torch.LongTensor]` of shape `(items + 1, num_quantizers)` a modality, *optional*): Codes that
            batches bring along, for the training of code vectors; [`MMRQVAETrainer`] sets them.

    Raises:
        ValueError: If the tables do not have the same number of rows.
    """

    def __init__(
        self,
        embeddings: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        rows: torch.LongTensor | None = None,
        weights: torch.Tensor | None = None,
    ):
        if weights is None:
            weights = torch.ones(len(next(iter(embeddings.values()))))
        sizes = {modality: len(table) for modality, table in embeddings.items()}
        sizes |= {f"present of {modality}": len(mask) for modality, mask in present.items()}
        sizes["weights"] = len(weights)
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"All tables must have one row an item and the padding row 0, got {sizes} rows; "
                "embed the same prepared dataset."
            )
        self.embeddings = embeddings
        self.present = present
        self.weights = weights
        if rows is None:
            rows = torch.stack(list(present.values())).any(0).nonzero()[:, 0]
        self.rows = rows[rows > 0]
        self.codes: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, dict[str, torch.Tensor]]:
        """A batch: what [`MMRQVAEModel.forward`] takes."""
        rows = self.rows[torch.as_tensor(indices)]
        batch = {
            "embeddings": {modality: table[rows] for modality, table in self.embeddings.items()},
            "present": {modality: mask[rows] for modality, mask in self.present.items()},
        }
        if self.codes is not None:
            batch["codes"] = {modality: codes[rows] for modality, codes in self.codes.items()}
        return batch

    def rows_with(self, modality: str) -> torch.LongTensor:
        """The dataset's rows that have the modality."""
        return self.rows[self.present[modality][self.rows]]

    def fewest(self) -> int:
        """How many items have the rarest modality."""
        return min(len(self.rows_with(modality)) for modality in self.embeddings)

    def split(self, fraction: float, generator: torch.Generator) -> tuple["ItemTables", "ItemTables"]:
        """Two datasets: all rows but a random `fraction`, and that fraction (three items at least, 10,000 at most)."""
        order = torch.randperm(len(self), generator=generator)
        held_out = max(min(round(fraction * len(self)), HELD_OUT_ITEMS), 3)
        return (
            ItemTables(self.embeddings, self.present, self.rows[order[held_out:]].sort().values, self.weights),
            ItemTables(self.embeddings, self.present, self.rows[order[:held_out]].sort().values, self.weights),
        )


def _evenly(count: int, chosen: int) -> torch.LongTensor:
    """Indices of `chosen` of `count` things, or of all where there are fewer, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, chosen), dtype=torch.float64).long()


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
        residual = torch.cat([latents(batch) for batch in _batches(branch, dataset, modality, sample)])
        levels = zip(branch.quantizer.layers, config.sinkhorn_epsilons)
        for layer, epsilon in tqdm(
            levels, total=config.num_quantizers, desc=f"k-means of {modality}", unit="level", delay=2
        ):
            layer.codebook.copy_(kmeans(residual, config.codebook_size, generator))
            _balance(layer, residual, epsilon)
            for part in residual.split(ENCODING_BATCH):
                part -= layer.decode(layer.encode(part))
        if searches:
            _fit_anchors(branch, dataset, modality, latents, generator)
        if config.objective == "stress" or config.encoder_projection:
            batches = _batches(branch, dataset, modality, rows)
            codes = torch.cat([branch.quantizer.encode(latents(batch)) for batch in batches])
            _fit_linear_decoder(branch, dataset, modality, codes)


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


def _batches(branch, dataset: ItemTables, modality: str, rows: torch.LongTensor, what: str = "pass over"):
    """The embeddings of `rows`, a batch at a time, where the model is; a bar says `what` is done, if it takes long."""
    for part in tqdm(rows.split(ENCODING_BATCH), desc=f"{what} {modality}", unit="batch", delay=2, leave=False):
        yield dataset.embeddings[modality][part].to(branch.input_mean.device, torch.float32)


def _fit_inputs(branch, dataset: ItemTables, modality: str, rows: torch.LongTensor) -> torch.Tensor:
    """Sets the inputs' mean and scale, and returns the principal directions, `(embedding_dim, embedding_dim)`, those
    of most variance first."""
    total = sum(batch.double().sum(0) for batch in _batches(branch, dataset, modality, rows))
    mean = total / len(rows)
    covariance = 0
    for batch in _batches(branch, dataset, modality, rows):
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
    parts = {name: _batches(model.branches[name], dataset, name, both) for name in (anchor, modality)}
    # Below these rows the projection is zero: a latent wider than the embedding does not fill.
    projection = projections[modality][: projections[modality].shape[1]]
    products = 0
    for left, right in zip(parts[anchor], parts[modality]):
        left = nn.functional.linear(model.branches[anchor].standardize(left), projections[anchor])
        right = nn.functional.linear(model.branches[modality].standardize(right), projection)
        products = products + left.double().T @ right.double()
    left, _, right = torch.linalg.svd(products, full_matrices=False)
    return (left @ right).to(projection.dtype) @ projection


def _balance(layer, residual: torch.Tensor, epsilon: float) -> None:
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
    batches = list(_batches(branch, dataset, modality, rows))
    branch.anchors.copy_(torch.cat([branch.standardize(batch) for batch in batches]))
    branch.anchor_codes.copy_(torch.cat([branch.quantizer.encode(latents(batch)) for batch in batches]))
    # The mean squared distance is twice the variance.
    before, after = branch.anchors, branch.quantizer.decode(branch.anchor_codes)
    branch.offset.copy_(2 * (before.var(0, correction=0).sum() - after.var(0, correction=0).sum()) / branch.width)


def _fit_linear_decoder(branch, dataset: ItemTables, modality: str, codes: torch.Tensor) -> None:
    """The decoder that makes the least squared error of all linear ones, given the codes of the dataset's items that
    have the modality."""
    gram = products = 0
    rows = dataset.rows_with(modality)
    width = branch.decoder[0].in_features
    vectors = torch.cat([layer.codebook for layer in branch.quantizer.layers]).float()
    # The solution lies in the span of the code vectors, which a wide space is far from filled by.
    basis = torch.linalg.qr(vectors.T).Q if len(vectors) < width else None
    for part, batch in zip(codes.split(ENCODING_BATCH), _batches(branch, dataset, modality, rows)):
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


@torch.no_grad()
def encode_items(
    model: MMRQVAEModel, dataset: ItemTables, return_quantized: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Semantic IDs of all rows of the dataset's tables, unique within a modality if `config.resolve_collisions`.

    Args:
        model ([`MMRQVAEModel`]): Put into evaluation mode.
        dataset ([`ItemTables`]): Its tables are read a batch at a time.
        return_quantized (`bool`, *optional*, defaults to `True`): Whether to hold the quantized vectors as well, which
            take `4 * codebook_dim` bytes an item.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: Codes `(items + 1, num_quantizers)` in int16 (in
        int32 for over 32,767 codes a level) and quantized vectors `(items + 1, codebook_dim)` a modality, on the CPU;
        -1 and 0 where the modality is missing.
    """
    model.eval()
    dtype = torch.int16 if model.config.codebook_size < 2**15 else torch.int32
    codes, quantized = {}, {}
    for modality, table in dataset.embeddings.items():
        present = dataset.present[modality].nonzero()[:, 0]
        found = torch.empty(len(present), model.config.num_quantizers, dtype=dtype)
        starts = range(0, len(present), ENCODING_BATCH)
        for start in tqdm(starts, desc=f"semantic IDs of {modality}", unit="batch", delay=2):
            part = slice(start, start + ENCODING_BATCH)
            found[part] = (
                model.encode({modality: table[present[part]].to(model.device)}).codes[modality].to("cpu", dtype)
            )
        if model.config.resolve_collisions:
            moved = shared(found).nonzero()[:, 0]
            branch = model.branches[modality]
            if isinstance(branch, MMRQVAEAnchorBranch):
                # Without latents an item lies where its code vectors put it.
                latents = quantized_rows(model, modality, found[moved])
            else:
                batches = _batches(branch, dataset, modality, present[moved])
                latents = [branch.latents(branch.standardize(batch)).cpu() for batch in batches]
                latents = torch.cat(latents) if latents else torch.empty(0, model.config.codebook_dim)
            resolve_collisions(found, moved, latents, model.code_vectors(modality).float().cpu())
        codes[modality] = torch.full((len(table), found.shape[1]), -1, dtype=dtype)
        codes[modality][present] = found
        if return_quantized:
            quantized[modality] = quantized_rows(model, modality, codes[modality])
    return codes, quantized


@torch.no_grad()
def quantized_rows(model: MMRQVAEModel, modality: str, codes: torch.Tensor) -> torch.Tensor:
    """Quantized vectors `(rows, codebook_dim)`, on the CPU, of `codes` `(rows, num_quantizers)`; 0 where these are
    -1."""
    quantized = torch.zeros(len(codes), model.config.codebook_dim)
    for rows in (codes[:, 0] >= 0).nonzero()[:, 0].split(ENCODING_BATCH):
        part = codes[rows].to(model.device, torch.long)
        quantized[rows] = model.branches[modality].quantizer.decode(part).float().cpu()
    return quantized


def code_metrics(codes: dict[str, torch.Tensor], codebook_size: int) -> dict[str, float]:
    """[`code_health`] a modality, and the collisions of the concatenated ID of the items
    that have any modality."""
    metrics = {}
    for modality, values in codes.items():
        health = code_health(values[values[:, 0] >= 0].numpy(), codebook_size)
        metrics |= {f"{name}_{modality}": value for name, value in health.items()}
    joined = torch.cat(list(codes.values()), 1)
    joined = joined[(joined >= 0).any(1)]
    _, owners = torch.unique(joined, dim=0, return_counts=True)
    metrics["collisions"] = float(owners[owners > 1].sum() / len(joined))
    return metrics


@dataclass
class HistoryDistances:
    """
    Distances from users' targets to the items of their histories.

    Args:
        users (`np.ndarray` of shape `(pairs,)`): Whose pair it is.
        before (`np.ndarray` of shape `(pairs,)`): Euclidean distance of the embeddings.
        after (`np.ndarray` of shape `(pairs,)`): Euclidean distance of the quantized vectors.
    """

    users: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def metrics(self) -> dict[str, float]:
        """`tau`, the mean of the users' Kendall's taus, and `tau_pooled`, over the pairs of all users."""
        return {
            "tau": mean_tau(self.users, self.before, self.after),
            "tau_pooled": pooled_tau(self.before, self.after),
        }


def history_distances(
    model: MMRQVAEModel,
    modality: str,
    dataset: ItemTables,
    codes: torch.Tensor,
    sequences,
    users: int = 1500,
    seed: int = 0,
) -> HistoryDistances:
    """
    Distances from target to history before and after quantization, over a seeded sample of users.

    Args:
        model ([`MMRQVAEModel`]): Its code vectors make the quantized items.
        modality (`str`): One of the model's.
        dataset ([`ItemTables`]): The tables; pairs with an item that lacks the modality are left out.
        codes (`torch.Tensor` of shape `(items + 1, num_quantizers)`): Codes of the modality, by [`encode_items`].
        sequences ([`~mmesid.trainer.data.prepared.Sequences`]): Histories and targets.
        users (`int`, *optional*, defaults to 1500): Size of the sample.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.
    """
    sample = np.random.default_rng(seed).permutation(len(sequences))[:users]
    groups, targets, histories = [], [], []
    for user in sample:
        example = sequences[int(user)]
        history = np.asarray(example["history"], dtype=np.int64)
        groups.append(np.full(len(history), user))
        targets.append(np.full(len(history), example["target"], dtype=np.int64))
        histories.append(history)
    groups, targets, histories = (torch.from_numpy(np.concatenate(parts)) for parts in (groups, targets, histories))
    present = dataset.present[modality]
    kept = present[targets] & present[histories]
    groups, targets, histories = groups[kept], targets[kept], histories[kept]
    table = dataset.embeddings[modality]
    before, after = [], []
    for left, right in zip(targets.split(ENCODING_BATCH), histories.split(ENCODING_BATCH)):
        before.append((table[left] - table[right]).norm(dim=1))
        left, right = (quantized_rows(model, modality, codes[rows]) for rows in (left, right))
        after.append((left - right).norm(dim=1))
    return HistoryDistances(groups.numpy(), torch.cat(before).numpy(), torch.cat(after).numpy())


class MMRQVAETrainer(HubTrainerMixin, Trainer):
    """
    A [`~transformers.Trainer`] of [`MMRQVAEModel`] on [`ItemTables`].

    Once an epoch the codes that no item of the epoch chose are moved to where items are, the offsets of balanced
    levels are found anew, and the health of the codes is logged: `use@l_<modality>` (share of the codes that are
    chosen), `dead@l_<modality>` (how many were not, and are revived), `perplexity@l_<modality>`, and
    `collisions_<modality>` (share of the items whose ID another has as well).

    For the objective `"stress"` every epoch begins with a pass of the search over all items, from the codes of their
    nearest anchors and with other anchors, drawn by weight, to measure the stress to; then `args.passes_per_epoch`
    times as many items as there are, drawn by weight too, train the code vectors with these codes. An epoch depends on
    nothing but the model and the seed, so that a training that is resumed between epochs is the same.

    Evaluation on held-out items measures `tau` (Kendall's tau of their distances to near and to any items of the
    training set, mean over the modalities), `tau_<modality>`, `reconstruction_<modality>` (mean squared error over
    variance), `recall@1_<modality>` (how often an item's quantized anchor finds its own quantized vector of the
    modality among those of all held-out items) and the loss.

    Args:
        model ([`MMRQVAEModel`]): Already initialised by [`initialize`].
        args ([`~mmesid.trainer.running.arguments.QuantizeArguments`]): As in [`~transformers.Trainer`].
        train_dataset ([`ItemTables`]): Items to learn from.
        eval_dataset ([`ItemTables`]): Held-out items.
        data ([`~mmesid.trainer.data.prepared.PreparedDataset`], *optional*): What the tables are made from, for
            [`~MMRQVAETrainer.describe`]. Without it nobody knows the items' ids, and the model is published alone.
        kwargs (`dict`, *optional*): Passed on to [`~transformers.Trainer`].

    Raises:
        ValueError: If a setting does not go with the objective.
    """

    stage = "quantize"
    evaluation_name = "held_out"

    def __init__(
        self,
        model: MMRQVAEModel,
        args: QuantizeArguments,
        train_dataset: ItemTables,
        eval_dataset: ItemTables,
        data: PreparedDataset | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        args.remove_unused_columns = False
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_already_a_batch,
            compute_metrics=self._heldout_metrics,
            **kwargs,
        )
        self.data = data
        config = model.config
        if args.codebook_ema_decay > 0:
            if config.objective in ("stress", "distance"):
                raise ValueError(
                    "codebook_ema_decay moves code vectors to the means of their residuals, which the objective "
                    f"'{config.objective}' does not want; set it to 0, or choose another objective."
                )
            for branch in model.branches.values():
                for layer in branch.quantizer.layers:
                    layer.codebook.requires_grad_(False)
        self._identities: dict[str, list[torch.Tensor]] = {name: [] for name in config.modalities}
        self._counts = {name: torch.zeros(config.num_quantizers, config.codebook_size) for name in config.modalities}
        self._steps_counted = 0
        self._losses: dict[str, float] = {}
        self._nearest: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        if config.objective == "stress":
            if args.dataloader_persistent_workers:
                raise ValueError(
                    "dataloader_persistent_workers keeps the codes of the first epoch, and the objective 'stress' "
                    "searches new ones for each; set it to false."
                )
            self.add_callback(_CodeSearch(self))

    def describe(self, directory: Path) -> tuple[dict, dict]:
        """
        Writes the semantic IDs of all items as `semantic_ids.parquet`, and in `figures/` how the codes are used and
        what they do to distances.

        A push during the training does so as well, lest old semantic IDs stay beside new weights. Training waits for
        it: for the objective `"stress"` the search for all items takes as long as some four epochs.

        Returns:
            `tuple[dict, dict]`: Metrics (`items` and `histories`) and details (`data`, `semantic_id_examples`) for the
                stage's record; empty without `data`.
        """
        if self.data is None:
            return {}, {}
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        data, items = self.data, self.train_dataset
        codes, _ = encode_items(model, items, return_quantized=False)
        sequences = data.sequences("validation")
        distances = {
            modality: history_distances(model, modality, items, codes[modality], sequences, seed=self.args.seed)
            for modality in codes
        }
        histories = {modality: pairs.metrics() for modality, pairs in distances.items()}
        write_semantic_ids(directory / SEMANTIC_IDS_NAME, data.item_ids, codes)
        draw_code_use(
            directory / "figures" / "code_use.png",
            {modality: values.numpy() for modality, values in codes.items()},
            model.config.codebook_size,
        )
        draw_distances(
            directory / "figures" / "distances.png",
            {modality: (pairs.before, pairs.after) for modality, pairs in distances.items()},
            {modality: f"{modality}, Kendall's tau {metrics['tau']:.3f}" for modality, metrics in histories.items()},
        )
        examples = semantic_id_examples(codes, data.frequencies, data.item_ids, data.titles)
        metrics = {"items": code_metrics(codes, model.config.codebook_size), "histories": histories}
        return metrics, {"data": data.statistics, "semantic_id_examples": examples}

    @torch.no_grad()
    def search_codes(self, epoch: int) -> None:
        """Gives the items of the training set, and the anchors among them, the codes that they have in this epoch."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        dataset, config = self.train_dataset, model.config
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        codes = {}
        for modality, branch in model.branches.items():
            if modality not in self._nearest:
                self._nearest[modality] = self._nearest_anchors(branch, modality)
            nearest, is_anchor, weights = self._nearest[modality]
            count = min(TRAINING_ANCHORS, int(weights.count_nonzero()))
            chosen = torch.multinomial(weights, count, generator=generator).to(self.args.device)
            branch.anchor_codes.copy_(branch.search(branch.anchors, branch.anchor_codes, chosen)[0])
            rows = dataset.rows_with(modality)
            found = torch.zeros(len(dataset.present[modality]), config.num_quantizers, dtype=torch.long)
            found[rows] = branch.anchor_codes.cpu()[nearest]
            others = rows[~is_anchor]
            batches = _batches(branch, dataset, modality, others, "search for codes of")
            for part, batch in zip(others.split(ENCODING_BATCH), batches):
                start = found[part].to(self.args.device)
                found[part] = branch.search(branch.standardize(batch), start, chosen)[0].cpu()
            codes[modality] = found
        dataset.codes = codes

    def _nearest_anchors(
        self, branch: MMRQVAEAnchorBranch, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the training set's items that have the modality: the nearest anchor, and whether it is the item itself;
        and the weights of the anchors. Anchors stay the same all through the training."""
        nearest, is_anchor = [], []
        rows = self.train_dataset.rows_with(modality)
        for batch in _batches(branch, self.train_dataset, modality, rows, "nearest anchors of"):
            inputs = branch.standardize(batch)
            found = nearest_anchors(inputs, branch.anchors)[:, 0]
            nearest.append(found.cpu())
            is_anchor.append((branch.anchors[found] == inputs).all(1).cpu())
        nearest, is_anchor = torch.cat(nearest), torch.cat(is_anchor)
        weights = torch.zeros(len(branch.anchors), dtype=torch.float64)
        # Items with the same embedding share an anchor.
        weights.index_add_(0, nearest[is_anchor], self.train_dataset.weights[rows[is_anchor]].double())
        return nearest, is_anchor, weights

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One group for the code vectors and the offset of their distances, with a rate of their own and no decay, and
        one for encoders and decoders."""
        if self.optimizer is None:
            model = self.model if model is None else model
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            of_codes = (".codebook", ".offset")
            codebooks = [parameter for name, parameter in trained.items() if name.endswith(of_codes)]
            networks = [parameter for name, parameter in trained.items() if not name.endswith(of_codes)]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate = self.args.codebook_learning_rate
            if rate is None:
                rate = CODEBOOK_LEARNING_RATES.get(self.model.config.objective, 1e-3)
            self.optimizer = optimizer_class(
                [
                    {"params": codebooks, "lr": rate, "weight_decay": 0.0},
                    {"params": networks, "weight_decay": self.args.weight_decay},
                ],
                **settings,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        if model.training:
            for name in ("objective_loss", "decoding_loss", "codebook_loss", "commitment_loss", "alignment_loss"):
                self._losses[name] = self._losses.get(name, 0.0) + float(output[name].detach())
            # Codes that were searched for are counted item by item, not batch by batch.
            counted = output.codes if self.train_dataset.codes is None else {}
            for modality, codes in counted.items():
                present = inputs["present"][modality]
                self._identities[modality].append(_identities(codes).masked_fill(~present, ABSENT))
                kept = codes[present].cpu()
                for level in range(kept.shape[1]):
                    self._counts[modality][level] += torch.bincount(
                        kept[:, level], minlength=self._counts[modality].shape[1]
                    )
        return (output.loss, output) if return_outputs else output.loss

    def floating_point_ops(self, inputs: dict) -> int:
        rows = len(next(iter(inputs["embeddings"].values())))
        return 6 * rows * self.model.num_parameters()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.codebook_ema_decay > 0:
            self._average_codebooks(self._prepare_inputs(inputs))
        self._steps_counted += 1
        if self._steps_counted >= self._steps_in_epoch():
            self._end_epoch(self._prepare_inputs(inputs))
        return loss

    def _get_train_sampler(self, train_dataset=None):
        if self.model.config.objective != "stress":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset
        return WeightedSampler(dataset.weights[dataset.rows], self._samples_in_epoch(), self.args.seed)

    def _samples_in_epoch(self) -> int:
        passes = self.args.passes_per_epoch if self.model.config.objective == "stress" else 1
        return passes * len(self.train_dataset)

    def _steps_in_epoch(self) -> int:
        rounded = math.floor if self.args.dataloader_drop_last else math.ceil
        return max(rounded(self._samples_in_epoch() / (self.args.train_batch_size * self.args.world_size)), 1)

    @torch.no_grad()
    def _end_epoch(self, inputs: dict) -> None:
        """Revives the codes that no item chose, balances, and logs the health of the codes and the parts of the
        loss."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        logs = {name: value / self._steps_counted for name, value in self._losses.items()}
        for modality in model.config.modalities:
            counts, identities = self._chosen_codes(modality)
            shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
            perplexity = torch.exp(torch.special.entr(shares).sum(1))
            for level in range(len(counts)):
                logs[f"use@{level + 1}_{modality}"] = float((counts[level] > 0).float().mean())
                logs[f"dead@{level + 1}_{modality}"] = int((counts[level] == 0).sum())
                logs[f"perplexity@{level + 1}_{modality}"] = float(perplexity[level])
            _, owners = torch.unique(identities, return_counts=True)
            logs[f"collisions_{modality}"] = float(owners[owners > 1].sum() / owners.sum().clamp_min(1))
            if model.config.objective == "stress":
                # The code vectors have moved farther than a decoder follows step by step.
                codes = self.train_dataset.codes[modality][self.train_dataset.rows_with(modality)]
                _fit_linear_decoder(model.branches[modality], self.train_dataset, modality, codes)
            self._revive(model, modality, counts == 0, inputs)
            self._balance(model, modality)
        self._losses.clear()
        self._steps_counted = 0
        self.log(logs)

    def _chosen_codes(self, modality: str) -> tuple[torch.Tensor, torch.Tensor]:
        """How many items of the epoch chose each code, `(num_quantizers, codebook_size)`, and their IDs, one number an
        item."""
        dataset, counts = self.train_dataset, self._counts[modality]
        if dataset.codes is not None:
            codes = dataset.codes[modality][dataset.rows_with(modality)]
            found = torch.stack([torch.bincount(level, minlength=counts.shape[1]) for level in codes.T])
            return found.to(self.args.device, counts.dtype), _identities(codes)
        found = self.accelerator.reduce(counts.to(self.args.device, copy=True), "sum")
        identities = self.accelerator.gather(torch.cat(self._identities[modality]))
        counts.zero_()
        self._identities[modality].clear()
        return found, identities[identities != ABSENT]

    def _revive(self, model: MMRQVAEModel, modality: str, dead: torch.Tensor, inputs: dict) -> None:
        if not dead.any():
            return
        values = inputs["embeddings"][modality][inputs["present"][modality]]
        branch = model.branches[modality]
        if isinstance(branch, MMRQVAEAnchorBranch):
            taken = branch.anchor_codes
        else:
            residual = branch.latents(branch.standardize(values)).float()
        for level, layer in enumerate(branch.quantizer.layers):
            codes = dead[level].nonzero()[:, 0]
            if isinstance(branch, MMRQVAEAnchorBranch):
                # A code beside that of a random anchor shares its items with it.
                places = layer.codebook[taken[:, level]]
                places = places + 0.1 * places.std() * torch.randn_like(places)
            else:
                places = residual
                residual = residual - layer.decode(layer.encode(residual))
            if len(codes) == 0:
                continue
            vectors = layer.codebook[codes]
            if len(places):
                chosen = torch.randint(len(places), (len(codes),), device=places.device)
                vectors = places[chosen].to(vectors.dtype)
            if self.args.world_size > 1:
                # All processes move a code to the same place, also one whose last batch lacks the modality.
                torch.distributed.broadcast(vectors, 0)
            layer.codebook[codes] = vectors
            state = self.optimizer.state.get(layer.codebook, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][codes] = 0

    def _balance(self, model: MMRQVAEModel, modality: str) -> None:
        """Finds the offsets of balanced levels anew, from the same items every time and on every process."""
        if not any(model.config.sinkhorn_epsilons):
            return
        dataset, branch = self.train_dataset, model.branches[modality]
        rows = dataset.rows_with(modality)
        rows = rows[:: math.ceil(max(len(rows), 1) / BALANCING_ITEMS)]
        inputs = dataset.embeddings[modality][rows].to(self.args.device, torch.float32)
        residual = branch.latents(branch.standardize(inputs))
        for layer, epsilon in zip(branch.quantizer.layers, model.config.sinkhorn_epsilons):
            _balance(layer, residual, epsilon)
            residual = residual - layer.decode(layer.encode(residual))

    @torch.no_grad()
    def _average_codebooks(self, inputs: dict) -> None:
        """Moves every code vector that was chosen towards the mean of the residuals that chose it."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        for modality, branch in model.branches.items():
            values = inputs["embeddings"][modality][inputs["present"][modality]]
            residual = branch.latents(branch.standardize(values)).float()
            for layer in branch.quantizer.layers:
                codes = layer.encode(residual)
                vectors = layer.decode(codes)
                counts = torch.bincount(codes, minlength=len(layer.codebook)).to(residual.dtype)
                sums = torch.zeros_like(layer.codebook, dtype=residual.dtype).index_add_(0, codes, residual)
                counts, sums = (self.accelerator.reduce(value, "sum") for value in (counts, sums))
                means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], layer.codebook)
                layer.codebook.lerp_(means.to(layer.codebook.dtype), 1 - self.args.codebook_ema_decay)
                residual = residual - vectors

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns the loss, what the model made of the items, and the items."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        made = {"quantized": output.quantized, "reconstructions": output.reconstructions}
        return output.loss.detach(), made, inputs

    @torch.no_grad()
    def _trained_items(self, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and quantized vectors of the items that held-out ones are compared with, evenly chosen from the
        training set."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        branch, dataset = model.branches[modality], self.train_dataset
        if isinstance(branch, MMRQVAEAnchorBranch):
            # Anchors have the codes that the code vectors were trained with.
            chosen = _evenly(len(branch.anchors), TAU_POOL)
            embeddings = branch.anchors[chosen] * branch.input_scale + branch.input_mean
            codes = branch.anchor_codes[chosen]
        else:
            rows = dataset.rows_with(modality)
            rows = rows[_evenly(len(rows), TAU_POOL)]
            embeddings = dataset.embeddings[modality][rows].to(self.args.device, torch.float32)
            codes = branch.encode(embeddings)
        return embeddings.float().cpu().numpy(), branch.quantizer.decode(codes).float().cpu().numpy()

    def _heldout_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        quantized, reconstructions = prediction.predictions["quantized"], prediction.predictions["reconstructions"]
        embeddings, present = prediction.label_ids["embeddings"], prediction.label_ids["present"]
        modalities = [name for name in self.model.config.modalities if present[name].sum() > 2]
        metrics = {}
        for modality in modalities:
            mask = present[modality]
            original = embeddings[modality][mask]
            metrics[f"tau_{modality}"] = _tau_to_others(
                (original, quantized[modality][mask]), self._trained_items(modality)
            )
            error = np.square(original - reconstructions[modality][mask]).sum()
            metrics[f"reconstruction_{modality}"] = float(error / np.square(original - original.mean(0)).sum())
        metrics["tau"] = float(np.mean([metrics[f"tau_{modality}"] for modality in modalities]))
        anchor = self.model.config.modalities[0]
        for modality in modalities:
            if modality != anchor and anchor in modalities:
                both = present[anchor] & present[modality]
                metrics[f"recall@1_{modality}"] = _recall_at_1(quantized[anchor][both], quantized[modality][both])
        return metrics


class WeightedSampler(Sampler):
    """
    Draws indices in proportion to weights, others every epoch and the same on every process.

    The draws are systematic: an index that is expected k times comes floor(k) or ceil(k) times. There may be more
    indices than the 2^24 of [`~torch.utils.data.WeightedRandomSampler`].

    Args:
        weights (`torch.Tensor` of shape `(indices,)`): Weights above 0.
        num_samples (`int`): Draws an epoch.
        seed (`int`): Seed of the first epoch.
    """

    def __init__(self, weights: torch.Tensor, num_samples: int, seed: int):
        self.weights, self.num_samples, self.seed, self.epoch = weights, num_samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        ends = self.weights.double().cumsum(0)
        steps = torch.arange(self.num_samples, dtype=torch.float64) + torch.rand(1, generator=generator)
        drawn = torch.searchsorted(ends, steps * (ends[-1] / self.num_samples), right=True).clamp_max(len(ends) - 1)
        yield from drawn[torch.randperm(self.num_samples, generator=generator)].tolist()


def _tau_to_others(items: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean tau of the distances from items to others; of both, the embeddings and the quantized vectors."""
    before, after = (
        pairwise_squared_distances(torch.from_numpy(left[:TAU_ITEMS]), torch.from_numpy(right)).numpy()
        for left, right in zip(items, others)
    )
    count, near = len(others[0]), min(len(others[0]), TAU_OTHERS // 2)
    # A history holds near and far items alike: half of the others are the nearest, half are spread evenly over all,
    # the same at every evaluation.
    nearest = np.argpartition(before, near - 1, axis=1)[:, :near]
    spread = np.arange(len(before))[:, None] + np.linspace(0, count, near, endpoint=False, dtype=np.int64)
    chosen = np.concatenate([nearest, spread % count], axis=1)
    groups = np.repeat(np.arange(len(before)), chosen.shape[1])
    # The order of squared distances is that of distances.
    before, after = (np.take_along_axis(squared, chosen, axis=1).ravel() for squared in (before, after))
    return mean_tau(groups, before, after)


def _recall_at_1(anchor: np.ndarray, other: np.ndarray) -> float:
    if len(anchor) == 0:
        return float("nan")
    anchor, other = (
        values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (anchor, other)
    )
    # A tie counts against: items that share all their codes are not told apart.
    own = (anchor * other).sum(1, keepdims=True)
    tolerance = 1e-6
    rivals = [
        (anchor[start : start + 1024] @ other.T >= own[start : start + 1024] - tolerance).sum(1)
        for start in range(0, len(anchor), 1024)
    ]
    return float((np.concatenate(rivals) == 1).mean())


def _identities(codes: torch.Tensor) -> torch.Tensor:
    """One number an ID, `(items,)`: a hash, by arithmetic modulo 2^64, of `codes` `(items, num_quantizers)`."""
    identities = torch.zeros_like(codes[:, 0])
    for level in range(codes.shape[1]):
        identities = identities * HASH_FACTOR + codes[:, level]
    return identities


def _already_a_batch(batch: dict) -> dict:
    return batch


class _CodeSearch(TrainerCallback):
    """Searches for the codes of an epoch before its first batch is read."""

    def __init__(self, trainer: MMRQVAETrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.search_codes(int(state.epoch))

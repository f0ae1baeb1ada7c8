"""What codes are worth: how they are used, and what quantization does to the distances between items."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import EvalPrediction

from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEModel

from ..metrics.codes.codes import code_health, collisions
from ..metrics.forgetting.forgetting import mean_tau, pooled_tau
from .collisions import resolve_collisions, shared
from .items import READ_ITEMS, ItemTables


# Held-out items whose distances are compared, to how many others each, of how many of the training set: evaluation
# takes a second, whatever the catalogue.
TAU_ITEMS = 512
TAU_OTHERS = 128
TAU_POOL = 4_096
# Users whose histories are looked at.
HISTORY_USERS = 1_500


@torch.no_grad()
def encode_items(model: MMRQVAEModel, dataset: ItemTables) -> dict[str, torch.Tensor]:
    """Codes `(items + 1, num_quantizers)` of each modality for all rows of the dataset's tables, as [`encode_rows`]
    finds them, unique within each modality if `config.resolve_collisions`; -1 where the modality is missing."""
    codes = {}
    for modality, table in dataset.tables.items():
        rows = table.present.nonzero()[:, 0]
        found = encode_rows(model, dataset, modality, rows)
        if model.config.resolve_collisions:
            moved = shared(found).nonzero()[:, 0]
            branch = model.branches[modality]
            latents = [branch.latents(batch).cpu() for batch in dataset.read(modality, rows[moved], model.device)]
            vectors = model.code_vectors(modality).float().cpu()
            resolve_collisions(found, moved, torch.cat([vectors[0, :0], *latents]), vectors)
        codes[modality] = found.new_full((len(table.present), found.shape[1]), -1)
        codes[modality][rows] = found
    return codes


@torch.no_grad()
def encode_rows(model: MMRQVAEModel, dataset: ItemTables, modality: str, rows: torch.Tensor) -> torch.Tensor:
    """Codes `(rows, num_quantizers)` that items get alone, in int16 (int32 for over 32,767 codes), on the CPU."""
    dtype = torch.int16 if model.config.codebook_size < 2**15 else torch.int32
    batches = dataset.read(modality, rows, model.device, "semantic IDs of")
    found = [model.branches[modality].encode(batch).to("cpu", dtype) for batch in batches]
    return torch.cat([torch.empty(0, model.config.num_quantizers, dtype=dtype), *found])


@torch.no_grad()
def quantized_rows(model: MMRQVAEModel, modality: str, codes: torch.Tensor) -> torch.Tensor:
    """Quantized vectors `(rows, codebook_dim)`, on the CPU, of `codes` `(rows, num_quantizers)`; 0 where these are
    -1."""
    quantized = torch.zeros(len(codes), model.config.codebook_dim)
    for rows in (codes[:, 0] >= 0).nonzero()[:, 0].split(READ_ITEMS):
        part = codes[rows].to(model.device, torch.long)
        quantized[rows] = model.branches[modality].quantizer.decode(part).float().cpu()
    return quantized


def code_metrics(codes: dict[str, torch.Tensor], codebook_size: int) -> dict[str, float]:
    """[`code_health`] of each modality, and the collisions of the concatenated ID of the items that have any
    modality."""
    metrics: dict[str, float] = {}
    for modality, values in codes.items():
        health = code_health(values[values[:, 0] >= 0].numpy(), codebook_size)
        metrics |= {f"{name}_{modality}": value for name, value in health.items()}
    joined = torch.cat(list(codes.values()), 1)
    joined = joined[(joined >= 0).any(1)]
    return metrics | {"collisions": collisions(joined.numpy())}


@dataclass
class HistoryDistances:
    """Distances `(pairs,)` from the targets of `users` to the items of their histories, of the embeddings (`before`)
    and of the quantized vectors (`after`)."""

    users: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def metrics(self) -> dict[str, float]:
        """`tau`, the mean of the users' Kendall's taus, and `tau_pooled`, over the pairs of all users."""
        tau = mean_tau(self.users, self.before, self.after)
        return {"tau": tau, "tau_pooled": pooled_tau(self.before, self.after)}


def history_distances(
    model: MMRQVAEModel, modality: str, dataset: ItemTables, codes: torch.Tensor, sequences, seed: int = 0
) -> HistoryDistances:
    """Distances from target to history over a seeded sample of users, with `codes` `(items + 1, num_quantizers)` of
    the modality; pairs with an item that lacks it are left out."""
    table, present = dataset.tables[modality]
    groups, targets, histories = history_pairs(present, sequences, seed)
    before, after = [], []
    for left, right in zip(targets.split(READ_ITEMS), histories.split(READ_ITEMS)):
        before.append((table[left] - table[right]).norm(dim=1))
        left, right = (quantized_rows(model, modality, codes[rows]) for rows in (left, right))
        after.append((left - right).norm(dim=1))
    return HistoryDistances(groups.numpy(), torch.cat(before).numpy(), torch.cat(after).numpy())


def history_pairs(present: torch.Tensor, sequences, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users, targets and items of their histories, `(pairs,)` each, over a seeded sample of users; pairs with an item
    that is not `present` `(items + 1,)` are left out."""
    sample = np.random.default_rng(seed).permutation(len(sequences))[:HISTORY_USERS]
    examples = [sequences[int(user)] for user in sample]
    lengths = torch.tensor([len(example["history"]) for example in examples])
    groups = torch.from_numpy(sample).repeat_interleave(lengths)
    targets = torch.tensor([example["target"] for example in examples]).repeat_interleave(lengths)
    histories = torch.from_numpy(np.concatenate([example["history"] for example in examples]).astype(np.int64))
    kept = present[targets] & present[histories]
    return groups[kept], targets[kept], histories[kept]


@torch.no_grad()
def sample_items(model: MMRQVAEModel, dataset: ItemTables) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Embeddings `(sample, embedding_dim)` and quantized vectors `(sample, codebook_dim)` of each modality, of items
    of the dataset, evenly chosen, that held-out ones are compared with."""
    sample = {}
    for modality in model.config.modalities:
        rows = dataset.rows_with(modality)
        spread = torch.linspace(0, len(rows) - 1, min(len(rows), TAU_POOL), dtype=torch.float64).long()
        embeddings = torch.cat(list(dataset.read(modality, rows[spread], model.device)))
        branch = model.branches[modality]
        quantized = branch.quantizer.decode(branch.encode(embeddings))
        sample[modality] = embeddings.cpu().numpy(), quantized.float().cpu().numpy()
    return sample


def held_out_metrics(
    prediction: EvalPrediction, trained: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """The metrics of [`MMRQVAETrainer`] but for the loss, from what it makes of held-out items and from those
    `trained` on, by [`sample_items`]; a modality that fewer than three held-out items have is left out."""
    quantized, reconstructions = prediction.predictions["quantized"], prediction.predictions["reconstructions"]
    embeddings, present = prediction.label_ids["embeddings"], prediction.label_ids["present"]
    modalities = [name for name in trained if present[name].sum() > 2]
    anchor, metrics = next(iter(trained)), {}
    for modality in modalities:
        mask = present[modality]
        original = embeddings[modality][mask]
        metrics[f"tau_{modality}"] = _tau_to_others((original, quantized[modality][mask]), trained[modality])
        error = np.square(original - reconstructions[modality][mask]).sum()
        metrics[f"reconstruction_{modality}"] = float(error / np.square(original - original.mean(0)).sum())
        if modality != anchor and anchor in modalities:
            both = present[anchor] & mask
            metrics[f"recall@1_{modality}"] = _recall_at_1(quantized[anchor][both], quantized[modality][both])
    return metrics | {"tau": float(np.mean([metrics[f"tau_{modality}"] for modality in modalities]))}


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
    # A tie counts against, within rounding: items that share all their codes are not told apart.
    lowest = (anchor * other).sum(1, keepdims=True) - 1e-6
    blocks = [slice(start, start + 1024) for start in range(0, len(anchor), 1024)]
    rivals = [(anchor[block] @ other.T >= lowest[block]).sum(1) for block in blocks]
    return float((np.concatenate(rivals) == 1).mean())

"""What codes are worth: how they are used, and what quantization does to the distances between items."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_mmesid.loss_mmrqvae import pairwise_squared_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEAnchorBranch, MMRQVAEModel

from ..metrics.codes.codes import code_health
from ..metrics.forgetting.forgetting import mean_tau, pooled_tau
from .collisions import resolve_collisions, shared
from .items import ENCODING_BATCH, ItemTables, read_batches


# Held-out items whose distances are compared, to how many others each, of how many of the training set: evaluation
# takes a second, whatever the catalogue.
TAU_ITEMS = 512
TAU_OTHERS = 128
TAU_POOL = 4_096


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
                batches = read_batches(branch, dataset, modality, present[moved])
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


def evenly(count: int, chosen: int) -> torch.LongTensor:
    """Indices of `chosen` of `count` things, or of all where there are fewer, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, chosen), dtype=torch.float64).long()


def tau_to_others(items: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]) -> float:
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


def recall_at_1(anchor: np.ndarray, other: np.ndarray) -> float:
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

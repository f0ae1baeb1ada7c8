"""What can be said of a recommender's items once it is trained: their spectrum, fusion weights and semantic IDs."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mmesid.hub_cards.figures import draw_fusion_weights, draw_singular_spectrum
from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor
from modeling_mmesid.items_mmesid import ITEMS_PER_BLOCK
from modeling_mmesid.recommendation import evaluating

from ..metrics.collapse.collapse import COLLAPSED, collapse_metrics, singular_values
from ..quantizer.evaluation import code_metrics
from ..quantizer.semantic_ids import SEMANTIC_IDS_NAME, semantic_id_examples, write_semantic_ids


# Whitened embeddings of two items that have nothing in common stand at a right angle, more or less.
LEAST_LIKENESS = 0.25


def describe_items(
    model: MMESIDForSequentialRecommendation, processor: MMESIDProcessor, directory: str | os.PathLike
) -> tuple[dict, dict]:
    """Measures the items of a recommender, and writes `semantic_ids.parquet` and `figures/` into the directory.
    Returns metrics (`item_tokens`, `scoring_table`, `semantic_ids`, as far as the items have them) and details
    (`semantic_id_examples`) for the stage's record."""
    directory = Path(directory)
    items, rows = model.model.items, torch.arange(1, model.config.num_items + 1, device=model.device)
    # As they are used: in training, items that it never saw have other vectors.
    with torch.no_grad(), evaluating(model):
        spectra = {"item tokens": _singular_values(items.tokens, rows)}
        if not model.config.share_item_table:
            spectra["scoring table"] = _singular_values(items.vectors, rows)
        weights = items.weights(rows).float().cpu()
    draw_singular_spectrum(directory / "figures" / "singular_spectrum.png", spectra, COLLAPSED)
    _draw_weights(model, weights, directory / "figures" / "fusion_weights.png")
    metrics = {name.replace(" ", "_"): collapse_metrics(values) for name, values in spectra.items()}
    codes = semantic_ids(model)
    if not codes:
        return metrics, {}
    item_ids = ["", *processor.item_ids]
    titles = item_ids if processor.titles is None else ["", *processor.titles]
    write_semantic_ids(directory / SEMANTIC_IDS_NAME, item_ids, codes)
    metrics["semantic_ids"] = code_metrics(codes, model.config.codebook_size)
    examples = semantic_id_examples(codes, model.model.items.fusion.frequencies.cpu(), item_ids, titles)
    return metrics, {"semantic_id_examples": examples}


def _singular_values(vectors: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> np.ndarray:
    """Those of `vectors(rows)`, which are computed in blocks: on the way a model holds many times as much."""
    return singular_values(torch.cat([vectors(block).float().cpu() for block in rows.split(ITEMS_PER_BLOCK)]).numpy())


def semantic_ids(model: MMESIDForSequentialRecommendation) -> dict[str, torch.Tensor]:
    """Codes `(items + 1, levels)` by modality, -1 where the item lacks it; empty if items have none."""
    if not model.config.num_quantizers:
        return {}
    return {
        name: modality.codes.masked_fill(~modality.present[:, None], -1).cpu()
        for name, modality in model.model.items.modalities.items()
    }


def similarity_vectors(model: MMESIDForSequentialRecommendation) -> dict[str, torch.Tensor]:
    """The vectors `(items + 1, width)` that items are compared by, for each modality whose similarity is scored, as
    long as the weight of that score makes them count."""
    modalities, weights = model.model.items.modalities, model.config.similarity_weights
    with torch.no_grad():
        return {
            name: weights[name] ** 0.5 * one.vectors(modalities[name]).cpu()
            for name, one in model.scorers.similarities.items()
        }


def most_alike(row: int, history: Sequence[int], vectors: dict[str, torch.Tensor]) -> tuple[str, int] | None:
    """Modality and row of the item of the history that is most like this one by [`similarity_vectors`]; `None` if none
    is like it, of cosine `LEAST_LIKENESS`."""
    found = [
        (float(table[row] @ table[one]), name, one)
        for name, table in vectors.items()
        for one in history
        if torch.cosine_similarity(table[row], table[one], dim=0) >= LEAST_LIKENESS
    ]
    _, modality, other = max(found, default=(0.0, "", 0), key=lambda one: one[0])
    return (modality, other) if modality else None


def _draw_weights(model: MMESIDForSequentialRecommendation, weights: torch.Tensor, path: Path) -> None:
    """The weights depend on an item's frequency and on what it lacks: shown are the items that lack nothing."""
    complete = (weights > 0).all(1)
    frequencies = model.model.items.fusion.frequencies[1:].cpu()[complete]
    points, first = torch.unique(frequencies, return_inverse=True)
    if len(points) == 0:
        return
    shares = torch.zeros(len(points), weights.shape[1])
    shares[first] = weights[complete] / weights.shape[1]
    id_name = "ID vector" if model.config.share_item_table else "score head"
    names = [id_name if name == "id" else name for name in model.model.items.source_names]
    draw_fusion_weights(path, points.numpy(), {name: shares[:, place].numpy() for place, name in enumerate(names)})

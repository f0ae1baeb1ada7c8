"""
The procedure that the recommender is measured against, as the published code of MME-SID does it: one left-padded
sequence for every prefix of a user, the catalogue scored by one matrix product for the score head and one for each
modality's projections, all logits held at once, and evaluation one user at a time, with gradients on.

It reads the same weights as ours, and two traps of the published code are closed, so that its loss is ours: position
ids count from the first token that is not padding, and row 0 is no item.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeling_mmesid import MMESIDForSequentialRecommendation


BATCH_SIZE = 16


def prefixes(examples: Sequence[dict]) -> list[tuple[np.ndarray, int]]:
    """Every history of the training examples (`history`, `targets`), each with the item that follows it."""
    return [
        (example["history"][: position + 1], int(target))
        for example in examples
        for position, target in enumerate(example["targets"])
    ]


def batches(examples: Sequence[dict], seed: int) -> list[list[tuple[np.ndarray, int]]]:
    """The prefixes in random order, `BATCH_SIZE` at a time."""
    rows = prefixes(examples)
    random.Random(seed).shuffle(rows)
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def encode(model: MMESIDForSequentialRecommendation, histories: Sequence[Sequence[int]]) -> torch.Tensor:
    """User representations of shape `(batch, hidden)`: the last state of left-padded rows of prompt and items."""
    prefix, suffix = model.config.prompt_prefix_ids, model.config.prompt_suffix_ids
    lengths = [len(prefix) + len(history) + len(suffix) for history in histories]
    shape = (len(histories), max(lengths))
    input_ids, items, attention_mask = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
        padding = shape[1] - length
        first_item = padding + len(prefix)
        input_ids[row, padding:first_item] = torch.tensor(prefix)
        items[row, first_item : first_item + len(history)] = torch.as_tensor(np.asarray(history, dtype=np.int64))
        input_ids[row, first_item + len(history) :] = torch.tensor(suffix)
        attention_mask[row, padding:] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    input_ids, items, attention_mask, position_ids = (
        tensor.to(model.device) for tensor in (input_ids, items, attention_mask, position_ids)
    )
    embedded = model.model.backbone.get_input_embeddings()(input_ids)
    tokens = model.model.items.tokens(items[items != 0]) * model.config.item_token_scale
    embedded = embedded.masked_scatter((items != 0)[..., None], tokens.to(embedded.dtype))
    states = model.model.backbone(
        inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return model.model.user_head(states[:, -1])


def project_items(model: MMESIDForSequentialRecommendation) -> tuple[torch.Tensor, torch.Tensor]:
    """The sources of all items, `(items + 1, sources, hidden)`, and their weights, `(items + 1, sources)`."""
    rows = torch.arange(model.config.num_items + 1, device=model.device)
    return model.model.items.sources(rows), model.model.items.weights(rows)


def score(
    model: MMESIDForSequentialRecommendation,
    users: torch.Tensor,
    projected: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scores of all items, `(batch, items + 1)`: one product for each source of an item, weighted by the fusion. As in
    the published code every call projects the catalogue anew, unless it is given as `projected`."""
    sources, weights = project_items(model) if projected is None else projected
    return sum(weights[:, source] * (users @ sources[:, source].T) for source in range(sources.shape[1]))


def loss(model: MMESIDForSequentialRecommendation, batch: Sequence[tuple[np.ndarray, int]]) -> torch.Tensor:
    """Mean cross-entropy over the catalogue of a batch of `(history, target)`."""
    logits = score(model, encode(model, [history for history, _ in batch]))
    targets = torch.tensor([target for _, target in batch], device=logits.device)
    return nn.functional.cross_entropy(logits[:, 1:].float(), targets - 1)


def rank(
    model: MMESIDForSequentialRecommendation,
    history: np.ndarray,
    target: int,
    projected: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[int, float]:
    """Rank of one user's target among the items that are not in the history, ties counted against it, and its
    cross-entropy."""
    scores = score(model, encode(model, [history[-model.config.max_history :]]), projected)[0].float()
    cross_entropy = nn.functional.cross_entropy(scores[1:], torch.tensor(target - 1, device=scores.device))
    candidates = torch.ones_like(scores, dtype=torch.bool)
    candidates[0] = False
    candidates[torch.as_tensor(np.asarray(history, dtype=np.int64), device=scores.device)] = False
    return int((scores[candidates] >= scores[target]).sum()), float(cross_entropy.detach())

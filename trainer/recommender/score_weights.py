"""How much the scores beside the decoder's weigh, chosen on validation."""

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_mmesid import MMESIDForSequentialRecommendation
from modeling_mmesid.recommendation import evaluating, mask_histories, pad_histories, target_ranks

from ..metrics.ranking.ranking import metrics


# Weights tried for each source in turn; twice, for the best weight of one depends on those of the others.
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
ROUNDS = 2

# As many tell weights apart: of 4,096, chance chose among neighbours.
USERS = 8192
USERS_AT_A_TIME = 256


@torch.no_grad()
def fit_score_weights(model: MMESIDForSequentialRecommendation, histories: Dataset) -> dict[str, float]:
    """
    Chooses the weight of each score beside the decoder's ([`~modeling_mmesid.scorers_mmesid.MMESIDScorers`]) by the
    nDCG@10 that all of them give together on held-out `histories`, and sets it in the model's configuration.

    Returns:
        `dict[str, float]`: The weight of each source, 0 where it does not help.
    """
    start = model.scorers.weights
    if not start:
        return {}
    # Parts of weight 0 would not be computed.
    model.scorers.weights = dict.fromkeys(start, 1.0)
    users = [histories[index] for index in range(0, len(histories), max(len(histories) // USERS, 1))]
    with evaluating(model):
        table = model.item_table()
        batches = [users[first : first + USERS_AT_A_TIME] for first in range(0, len(users), USERS_AT_A_TIME)]
        states = [model.parts(model.encode_histories([user["history"] for user in batch])) for batch in batches]
    fitted = dict(start)
    for source in tqdm([*start] * ROUNDS, desc="Weights of scores", leave=False, delay=2):
        found = _ndcg_by_weight(source, fitted, batches, states, table, model.parts(table))
        # Of equal ones the least: a source that does not help stays out.
        fitted[source] = max(WEIGHTS, key=lambda weight: (found[weight], -weight))
    model.scorers.weights = fitted
    return fitted


def _ndcg_by_weight(source: str, weights: dict[str, float], batches, states, table, tables) -> dict[float, float]:
    """nDCG@10 for each of `WEIGHTS` of one source, the others as in `weights`; `tables` are the parts of `table`."""
    ranks: dict[float, list[torch.Tensor]] = {weight: [] for weight in WEIGHTS}
    factors = [1.0, *(0.0 if name == source else weight for name, weight in weights.items())]
    varied = 1 + list(weights).index(source)
    for batch, parts in zip(batches, states, strict=True):
        fixed = torch.cat([factor * part for factor, part in zip(factors, parts, strict=True)], dim=-1) @ table.T
        fixed[:, 0] = -torch.inf
        mask_histories(fixed, pad_histories([user["history"] for user in batch], fixed.device))
        part = parts[varied] @ tables[varied].T
        targets = torch.tensor([user["target"] for user in batch], device=fixed.device)
        for weight in WEIGHTS:
            ranks[weight].append(target_ranks(fixed + weight * part, targets))
    return {weight: metrics(torch.cat(values).cpu().numpy())["ndcg@10"] for weight, values in ranks.items()}

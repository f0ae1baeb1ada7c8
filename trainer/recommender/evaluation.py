"""Full-ranking evaluation: every held-out target among the whole catalogue, for several models side by side."""

import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments

from modeling_mmesid import SASRecForSequentialRecommendation
from modeling_mmesid.recommendation import mask_histories, pad_histories, target_ranks

from ..data.prepared import PreparedDataset
from ..data.windows import EvaluationHistories
from ..metrics.ranking import analysis
from .mmesid_trainer import MMESIDTrainer
from .sasrec_trainer import SASRecTrainer


SPLITS = ("validation", "test")
COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
POPULARITY = "popularity"


def evaluate(
    data: PreparedDataset,
    models: Mapping[str, PreTrainedModel],
    *,
    batch_size: int = 256,
    bootstrap_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """
    Ranks the whole catalogue for each held-out user, by popularity and by each model.

    Args:
        data ([`PreparedDataset`]): The data that the models were trained on.
        models (`Mapping[str, PreTrainedModel]`): SASRec and recommenders by the name that they have in the results.
        batch_size (`int`, *optional*, defaults to 256): Users ranked at a time.
        bootstrap_resamples (`int`, *optional*, defaults to 1000): Draws of all users that the 95% intervals come from.
        seed (`int`, *optional*, defaults to 0): Seed of these draws.

    Returns:
        `dict[str, dict]`: For each model what [`summarize`] returns; `"popularity"` first.

    Raises:
        ValueError: If a model was trained on another catalogue, or is called "popularity".
    """
    if POPULARITY in models:
        raise ValueError(f"A model is called '{POPULARITY}', as the baseline is; give it another name.")
    with tempfile.TemporaryDirectory() as unused:
        args = TrainingArguments(unused, per_device_eval_batch_size=batch_size, report_to="none")
        ranks = {POPULARITY: {split: popularity_ranks(data, split) for split in SPLITS}}
        for name, model in models.items():
            ranks[name] = {split: model_ranks(model, data, split, args) for split in SPLITS}
    return {name: summarize(by_split, data, seed, bootstrap_resamples) for name, by_split in ranks.items()}


def model_ranks(model: PreTrainedModel, data: PreparedDataset, split: str, args: TrainingArguments) -> np.ndarray:
    """Rank of each user's target in a split, `(users,)` in the order of the prepared users; `args` set batch size and
    device."""
    if model.config.num_items != data.num_items:
        raise ValueError(
            f"The model '{model.name_or_path}' knows {model.config.num_items} items, but the data have "
            f"{data.num_items}; evaluate it on the data it was trained on."
        )
    data.require_targets()
    trainer_class = SASRecTrainer if isinstance(model, SASRecForSequentialRecommendation) else MMESIDTrainer
    histories = EvaluationHistories(data.sequences(split))
    predicted = trainer_class(model, args).predict(histories)
    # Each user once and in order, however many processes shared the work.
    if not np.array_equal(predicted.label_ids, histories.sequences.targets[histories.order]):
        raise AssertionError(f"The ranks on {split} do not belong to the users one by one.")
    ranks = np.empty_like(predicted.predictions)
    ranks[histories.order] = predicted.predictions
    return ranks


def popularity_ranks(data: PreparedDataset, split: str, batch_size: int = 1024) -> np.ndarray:
    """Rank of each user's target, `(users,)`, by the number of training interactions, under the same masking and tie
    rule as the models."""
    data.require_targets()
    sequences = data.sequences(split)
    popularity = data.frequencies.float()
    popularity[0] = -torch.inf
    ranks = []
    for start in tqdm(range(0, len(sequences), batch_size), desc=f"Popularity on {split}", leave=False, delay=2):
        users = [sequences[index] for index in range(start, min(start + batch_size, len(sequences)))]
        scores = popularity.repeat(len(users), 1)
        mask_histories(scores, pad_histories([user["history"] for user in users]))
        ranks.append(target_ranks(scores, torch.tensor([user["target"] for user in users])).numpy())
    return np.concatenate(ranks)


def summarize(ranks: Mapping[str, np.ndarray], data: PreparedDataset, seed: int, resamples: int) -> dict[str, dict]:
    """What one model's ranks, `(users,)` for each split, amount to: `hr@k`, `ndcg@k` and `mrr` of each split;
    `test_confidence`, the 95% interval of each of them on the test split; `test_by_frequency` and
    `test_by_history_length`, users and metrics of each group."""
    test = data.sequences("test")
    return {split: analysis.metrics(ranks[split]) for split in SPLITS} | {
        "test_confidence": analysis.confidence_intervals(ranks["test"], seed, resamples),
        "test_by_frequency": analysis.metrics_by_frequency(ranks["test"], test.targets, data.frequencies.numpy()),
        "test_by_history_length": analysis.metrics_by_history_length(ranks["test"], np.diff(test.offsets)),
    }


def results_page(results: Mapping[str, dict[str, dict]], statistics: dict) -> str:
    """The results as Markdown: a table of all metrics for each split, and nDCG@10 on test for each group of users;
    labelled where the data are synthetic."""
    label = " (synthetic data: the figures say nothing about real users)" if statistics["synthetic"] else ""
    lines = []
    for split in SPLITS:
        rows = {name: [result[split][column] for column in COLUMNS] for name, result in results.items()}
        lines += [f"### {split.capitalize()}{label}", "", *_table(COLUMNS, rows), ""]
    # All models rank the same users: the groups are those of any of them.
    groups = [
        (kind, group, figures["users"])
        for kind in ("test_by_frequency", "test_by_history_length")
        for group, figures in next(iter(results.values()))[kind].items()
    ]
    columns = [f"{group} ({users:,})" for _, group, users in groups]
    rows = {name: [result[kind][group]["ndcg@10"] for kind, group, _ in groups] for name, result in results.items()}
    intervals = {name: result["test_confidence"]["ndcg@10"] for name, result in results.items()}
    cells = {name: [f"{low:.4f} to {high:.4f}", *rows[name]] for name, (low, high) in intervals.items()}
    lines += [
        f"### Test, nDCG@10 by group (users){label}",
        "",
        *_table(["95% interval", *columns], cells),
        "",
        "The interval is a bootstrap over users. Targets are cold if the training split never has them, head if they "
        f"are among the {analysis.HEAD_SHARE:.0%} of the items it has most often, else tail; numbers are items in the "
        "history.",
        "",
    ]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float | str]]) -> list[str]:
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [value if isinstance(value, str) else f"{value:.4f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines

"""Full-ranking evaluation: every held-out target among the whole catalogue, for models, sums of models and baselines
side by side."""

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_mmesid.recommendation import evaluating, mask_histories, pad_histories, score_items, target_ranks

from ..data.prepared import PreparedDataset
from ..data.tables import EmbeddingTable
from ..data.windows import EvaluationHistories
from ..metrics.ranking import analysis
from ..metrics.ranking.comparison import paired_bootstrap
from ..metrics.ranking.ranking import user_values
from .baselines import Scorer, co_occurrence, popularity, text_neighbours, transitions


SPLITS = ("validation", "test")
COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
# In the order of the tables; the last two take embeddings of texts.
TEXT_BASELINES = ("text_neighbours", "transitions")
BASELINES = ("popularity", "co_occurrence", *TEXT_BASELINES)
# What models are held against each other by.
COMPARED_METRICS = ("ndcg@10", "hr@10")


def evaluate(
    data: PreparedDataset,
    models: Mapping[str, PreTrainedModel | Sequence[PreTrainedModel]],
    *,
    text: EmbeddingTable | None = None,
    batch_size: int = 256,
    bootstrap_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """
    Ranks the whole catalogue for each held-out user, by baselines that are not trained and by each model.

    Args:
        data ([`PreparedDataset`]): The data that the models were trained on.
        models (`Mapping[str, PreTrainedModel | Sequence[PreTrainedModel]]`): SASRec and recommenders by the name that
            they have in the results; the scores of several models under one name are added.
        text ([`EmbeddingTable`], *optional*): Embeddings of the items' texts, for the baselines that read them.
        batch_size (`int`, *optional*, defaults to 256): Users ranked at a time.
        bootstrap_resamples (`int`, *optional*, defaults to 1000): Draws of all users that the 95% intervals come from.
        seed (`int`, *optional*, defaults to 0): Seed of these draws.

    Returns:
        `dict[str, dict]`: For each baseline, `"popularity"` first, and each model what [`summarize`] returns; of
        models `test_differences` too, see [`differences_on_test`].

    Raises:
        ValueError: If a model was trained on another catalogue, or is called as a baseline is.
    """
    for name in models:
        require_own_name(name)
    ranks = {name: baseline_ranks(name, data, text) for name in BASELINES if text or name not in TEXT_BASELINES}
    for name, model in models.items():
        parts = [model] if isinstance(model, PreTrainedModel) else list(model)
        ranks[name] = {split: model_ranks(parts, data, split, batch_size) for split in SPLITS}
    return summarize_all(ranks, list(models), data, seed, bootstrap_resamples)


def require_own_name(name: str) -> None:
    """Raises `ValueError` if a model is called as a baseline is."""
    if name in BASELINES:
        raise ValueError(f"A model is called '{name}', as the baseline is; give it another name.")


def baseline_ranks(name: str, data: PreparedDataset, text: EmbeddingTable | None = None) -> dict[str, np.ndarray]:
    """Rank of each user's target by split, `(users,)`, by a baseline, one of `BASELINES`; `text` has the embeddings of
    the texts for those that read them."""
    if name == "popularity":
        scorer = popularity(data.frequencies)
    elif name == "co_occurrence":
        scorer = co_occurrence(data.sequences("train"), data.num_items)
    elif name == "text_neighbours":
        scorer = text_neighbours(text)
    else:
        scorer = transitions(data.sequences("train"), text)
    return {split: target_ranks_of(scorer, data, split) for split in SPLITS}


def model_ranks(
    models: Sequence[PreTrainedModel], data: PreparedDataset, split: str, batch_size: int = 256
) -> np.ndarray:
    """Rank of each user's target in a split, `(users,)`, by the sum of the scores of one model or more, which stand on
    one device."""
    for model in models:
        if model.config.num_items != data.num_items:
            raise ValueError(
                f"The model '{model.name_or_path}' knows {model.config.num_items} items, but the data have "
                f"{data.num_items}; evaluate it on the data it was trained on."
            )
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        tables = [model.item_table() for model in models]

        def score(histories: Sequence[np.ndarray]) -> torch.Tensor:
            scores = [score_items(model.encode_histories(histories), table) for model, table in zip(models, tables)]
            return torch.stack(scores).sum(0) if len(scores) > 1 else scores[0]

        return target_ranks_of(score, data, split, batch_size)


def target_ranks_of(scorer: Scorer, data: PreparedDataset, split: str, batch_size: int = 256) -> np.ndarray:
    """Rank of each user's target in a split, `(users,)` in the order of the prepared users, among all items but those
    of the history. Processes share the users, and each returns all ranks."""
    data.require_targets()
    histories = EvaluationHistories(data.sequences(split))
    state = PartialState()
    ranks = torch.zeros(len(histories), dtype=torch.long)
    starts = range(state.process_index * batch_size, len(histories), state.num_processes * batch_size)
    hidden = not state.is_local_main_process
    for start in tqdm(starts, desc=f"Ranking on {split}", unit="batch", leave=False, delay=2, disable=hidden):
        users = histories.order[start : start + batch_size]
        examples = [histories.sequences[int(user)] for user in users]
        scores = scorer([example["history"] for example in examples])
        scores[:, 0] = -torch.inf
        mask_histories(scores, pad_histories([example["history"] for example in examples], scores.device))
        targets = torch.tensor([example["target"] for example in examples], device=scores.device)
        ranks[torch.from_numpy(users)] = target_ranks(scores, targets).cpu()
    return reduce(ranks.to(state.device), "sum").cpu().numpy()


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


def summarize_all(
    ranks: Mapping[str, Mapping[str, np.ndarray]],
    models: Sequence[str],
    data: PreparedDataset,
    seed: int,
    resamples: int,
) -> dict[str, dict]:
    """What [`summarize`] returns of each of `ranks`, by name, with `test_differences` of those that are `models`."""
    results = {name: summarize(by_split, data, seed, resamples) for name, by_split in ranks.items()}
    on_test = {name: by_split["test"] for name, by_split in ranks.items()}
    for name in models if len(ranks) > 1 else ():
        results[name]["test_differences"] = differences_on_test(name, on_test, seed, resamples)
    return results


def differences_on_test(name: str, ranks: Mapping[str, np.ndarray], seed: int, resamples: int) -> dict[str, dict]:
    """
    How far a model is above each other one on the same users, `ranks` `(users,)` by name: for each metric of
    `COMPARED_METRICS` the mean `difference`, its 95% `interval` and the `p` of no difference by a paired bootstrap
    over users ([`~mmesid.trainer.metrics.ranking.comparison.paired_bootstrap`]).
    """
    others = [other for other in ranks if other != name]
    values = {one: user_values(ranks[one]) for one in ranks}
    pairs = [(other, metric) for other in others for metric in COMPARED_METRICS]
    differences = np.stack([values[name][metric] - values[other][metric] for other, metric in pairs], axis=1)
    intervals, p_values = paired_bootstrap(differences, seed, resamples)
    table: dict[str, dict] = {other: {} for other in others}
    for (other, metric), mean, interval, p in zip(pairs, differences.mean(0), intervals, p_values, strict=True):
        table[other][metric] = {"difference": float(mean), "interval": interval.tolist(), "p": float(p)}
    return table


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

"""Evaluations of several models and seeds side by side: means and spread, paired tests, groups of items, cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..metrics.ranking import analysis
from ..metrics.ranking.comparison import holm, paired_bootstrap
from ..metrics.ranking.ranking import user_values
from .evaluation import COLUMNS, COMPARED_METRICS, SPLITS


# What models are chosen by, on validation.
MAIN_METRIC = "ndcg@10"


class Evaluation(NamedTuple):
    """
    One model of one seed.

    Args:
        model (`str`): Its name.
        trainings (`list[dict]`): What the records of its parts say of their trainings (several for a sum of models,
            none for a baseline that nobody trains): `stage`, `seed`, `modalities`, `parameters`, `seconds`,
            `peak_memory_bytes` and `hardware`.
        ranks (`dict[str, np.ndarray]`): Rank of every user's target by split, `(users,)`.
    """

    model: str
    trainings: list[dict]
    ranks: dict[str, np.ndarray]

    @property
    def seed(self) -> int | None:
        """That of the first part."""
        return self.trainings[0]["seed"] if self.trainings else None

    @property
    def has_content(self) -> bool:
        return any(training["modalities"] for training in self.trainings)


def read_evaluations(directories: Iterable[Path], users: Mapping[str, list[str]]) -> dict[str, list[Evaluation]]:
    """
    The evaluations in the directories of `mmesid evaluate`, by model, in the order in which they are met. A baseline
    that nobody trains counts once; a model counts once for every seed.

    Args:
        directories (`Iterable[Path]`): The directories.
        users (`Mapping[str, list[str]]`): Raw ids of the prepared users by split, in their order.

    Raises:
        ValueError: If the users are others, or a model comes twice with the same seed.
    """
    models: dict[str, list[Evaluation]] = {}
    for directory in directories:
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        tables = {split: pq.read_table(directory / "ranks" / f"{split}.parquet") for split in SPLITS}
        for split, table in tables.items():
            if table["user_id"].to_pylist() != users[split]:
                raise ValueError(f"'{directory}' has ranks of other users than --prepared_dir; evaluate it again.")
        for name, result in results.items():
            ranks = {split: table[name].to_numpy() for split, table in tables.items()}
            found, others = Evaluation(name, result["trainings"], ranks), models.setdefault(name, [])
            if found.seed not in [other.seed for other in others]:
                others.append(found)
            elif found.trainings:
                raise ValueError(f"'{name}' of seed {found.seed} is evaluated twice; leave '{directory}' out.")
    return models


def runs_table(models: Mapping[str, Sequence[Evaluation]]) -> pd.DataFrame:
    """A row for each model and seed: metrics of both splits as `<split> <metric>`, `parameters`, `seconds` and
    `peak_memory_gib` of its training (of a sum, all parameters and seconds, and the largest memory)."""
    rows = []
    for name, evaluations in models.items():
        for one in evaluations:
            row: dict = {"model": name, "seed": one.seed}
            for split in SPLITS:
                figures = analysis.metrics(one.ranks[split])
                row |= {f"{split} {column}": figures[column] for column in COLUMNS}
            if one.trainings:
                row["parameters"] = sum(training["parameters"] or 0 for training in one.trainings)
                row["seconds"] = sum(training["seconds"] for training in one.trainings)
                row["peak_memory_gib"] = max(training["peak_memory_bytes"] for training in one.trainings) / 2**30
            rows.append(row)
    metrics = [f"{split} {column}" for split in SPLITS for column in COLUMNS]
    columns = ["model", "seed", *metrics, "parameters", "seconds", "peak_memory_gib"]
    return pd.DataFrame(rows, columns=columns).astype({"seed": "Int64"})


def best_baseline(runs: pd.DataFrame, baselines: Sequence[str]) -> str:
    """The baseline with the best mean over seeds on validation."""
    return runs[runs.model.isin(baselines)].groupby("model")[f"validation {MAIN_METRIC}"].mean().idxmax()


def comparisons_table(
    models: Mapping[str, Sequence[Evaluation]],
    pairs: Sequence[tuple[str, str]],
    seed: int,
    resamples: int,
) -> pd.DataFrame:
    """
    Each pair of a model and one that it is held against, on test: for each metric the `difference` of the means over
    seeds, `relative` to the other's, the 95% interval from `low` to `high` and the `p` of no difference
    ([`~mmesid.trainer.metrics.ranking.comparison.paired_bootstrap`]; a user's value is the mean over seeds), and
    `p_holm`, corrected for how many models are held against the same one. Both have the `seeds` that they share, or
    all of theirs if they share none.
    """
    rows, differences = [], []
    for name, against in pairs:
        (ours, theirs), seeds = _paired(models[name], models[against])
        for metric in COMPARED_METRICS:
            values, others = _mean_values(ours, metric), _mean_values(theirs, metric)
            differences.append(values - others)
            relative = (values.mean() / others.mean() - 1) if others.any() else np.nan
            rows.append({"model": name, "against": against, "metric": metric, "seeds": seeds,
                         "difference": differences[-1].mean(), "relative": relative})  # fmt: skip
    columns = ["model", "against", "metric", "seeds", "difference", "relative"]
    table = pd.DataFrame(rows, columns=columns)
    if rows:
        intervals, table["p"] = paired_bootstrap(np.stack(differences, axis=1), seed, resamples)
        table["low"], table["high"] = intervals.T
        table["p_holm"] = table.groupby(["against", "metric"])["p"].transform(lambda p: holm(p.to_numpy()))
    return table.reindex(columns=[*columns, "low", "high", "p", "p_holm"])


def _paired(
    ours: Sequence[Evaluation], theirs: Sequence[Evaluation]
) -> tuple[tuple[Sequence[Evaluation], Sequence[Evaluation]], int]:
    shared = {one.seed for one in ours} & {one.seed for one in theirs} - {None}
    if shared:
        ours, theirs = ([one for one in side if one.seed in shared] for side in (ours, theirs))
    return (ours, theirs), max(len(ours), len(theirs))


def _mean_values(evaluations: Sequence[Evaluation], metric: str) -> np.ndarray:
    """Mean over seeds of what each user contributes to a metric on test, `(users,)`."""
    return np.mean([user_values(one.ranks["test"])[metric] for one in evaluations], axis=0)


def groups_table(models: Mapping[str, Sequence[Evaluation]], occurrences: np.ndarray) -> pd.DataFrame:
    """A row for each model and group of test users by the training interactions of their target, `occurrences`
    `(users,)`: `users`, and the means over seeds of all metrics."""
    rows = []
    for name, evaluations in models.items():
        by_seed = [analysis.metrics_by_occurrences(one.ranks["test"], occurrences) for one in evaluations]
        for group in by_seed[0]:
            means = {column: np.mean([groups[group][column] for groups in by_seed]) for column in COLUMNS}
            rows.append({"model": name, "occurrences": group, "users": by_seed[0][group]["users"]} | means)
    return pd.DataFrame(rows)


def report_page(
    runs: pd.DataFrame,
    comparisons: pd.DataFrame,
    groups: pd.DataFrame,
    baselines: Sequence[str],
    statistics: dict,
    resamples: int,
    figures: Sequence[str],
) -> str:
    """All of it as Markdown, with the figures of these names beside it."""
    label = " (synthetic data: the figures say nothing about real users)" if statistics["synthetic"] else ""
    names = list(dict.fromkeys(runs.model))
    by_model = {name: runs[runs.model == name] for name in names}
    title = {name: f"{name} (baseline)" if name in baselines else name for name in names}
    columns = [f"validation {MAIN_METRIC}", *(f"test {column}" for column in COLUMNS)]
    lines = [f"# {statistics.get('source') or 'Comparison'}{label}", ""]
    lines += [f"Full ranking of {statistics['items']:,} items for {statistics['users']:,} users.", ""]
    lines += ["## Models", "", "Mean over seeds ± standard deviation.", ""]
    rows = [[title[name], _seeds(of), *(_mean(of[column]) for column in columns)] for name, of in by_model.items()]
    lines += [*_markdown(["model", "seeds", *columns], rows), ""]
    for against, of in comparisons.groupby("against", sort=False):
        rows = [
            [row.model, row.metric, f"{row.difference:+.4f}", "" if np.isnan(row.relative) else f"{row.relative:+.1%}",
             f"{row.low:+.4f} to {row.high:+.4f}", _p(row.p), _p(row.p_holm)]
            for row in of.itertuples()
        ]  # fmt: skip
        header = ["model", "test metric", "difference", "relative", "95% interval", "p", "p (Holm)"]
        lines += [f"## Against {against}", "", *_markdown(header, rows), ""]
    if len(comparisons):
        lines += [
            f"Paired bootstrap over users with {resamples:,} draws of their means over shared seeds; Holm's "
            "correction is for the models of a table, for each metric. It says nothing of other seeds: the standard "
            "deviation does.",
            "",
        ]
    wide = groups.pivot(index="model", columns="occurrences", values=MAIN_METRIC)
    users = groups.drop_duplicates("occurrences").set_index("occurrences").users
    order = list(dict.fromkeys(groups.occurrences))
    lines += [f"## Test {MAIN_METRIC} by training interactions of the target (users)", ""]
    header = ["model", *(f"{group} ({users[group]:,})" for group in order)]
    cold = groups[groups.occurrences == "0"].set_index("model")["hr@10"]
    rows = [[name, *(f"{wide.loc[name, group]:.4f}" for group in order)] for name in names]
    if len(cold):
        header.append("hr@10 of 0")
        rows = [[*row, f"{cold[name]:.4f}"] for name, row in zip(names, rows)]
    lines += [*_markdown(header, rows), ""]
    trained = runs.dropna(subset=["seconds"])
    lines += ["## Cost of training", "", "Of a sum of models: all seconds, the largest memory.", ""]
    rows = [
        [row.model, str(row.seed), f"{row.parameters:,.0f}", f"{row.seconds:,.0f}", f"{row.peak_memory_gib:.2f}"]
        for row in trained.itertuples()
    ]
    lines += [*_markdown(["model", "seed", "parameters", "seconds", "peak memory, GiB"], rows), ""]
    lines += [f"![{figure}]({figure}.png)\n" for figure in figures]
    return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _seeds(runs: pd.DataFrame) -> str:
    return ", ".join(map(str, runs.seed.dropna())) or "none"


def _mean(values: pd.Series) -> str:
    spread = f" ± {values.std():.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"

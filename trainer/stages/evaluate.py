"""
Ranks the whole catalogue for every held-out user and writes one table: popularity, SASRec, the recommenders.

    mmesid evaluate --prepared_dir runs/quickstart/prepared --model_dirs runs/quickstart/sasrec
    runs/quickstart/recommender \
        --output_dir runs/quickstart/evaluation
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, TrainingArguments

from modeling_mmesid import SASRecForSequentialRecommendation
from modeling_mmesid.recommendation import mask_histories, pad_histories, target_ranks

from ..data.prepared import PreparedDataset
from ..data.windows import EvaluationHistories
from ..metrics.ranking.analysis import (
    HEAD_SHARE,
    confidence_intervals,
    metrics,
    metrics_by_frequency,
    metrics_by_history_length,
)
from ..publishing.repository import add_metrics
from ..recommender.mmesid_trainer import MMESIDTrainer
from ..recommender.sasrec_trainer import SASRecTrainer
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import RECORD_NAME, StageRecord, StageRun


SPLITS = ("validation", "test")
RANKING_STAGES = ("sasrec", "finetune")
COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


@dataclass(kw_only=True)
class EvaluateArguments(StageArguments):
    """
    Rank the whole catalogue for every held-out user, with popularity, SASRec and the recommenders side by side.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
        model_dirs (`list[str]`): Directories written by `mmesid sasrec` and `mmesid finetune`.

        > Computation

        per_device_eval_batch_size (`int`, *optional*, defaults to `256`): Users a device ranks at a time.
        bootstrap_resamples (`int`, *optional*, defaults to `1000`): Draws of all users that the confidence intervals
            come from.
        seed (`int`, *optional*, defaults to `0`): Seed of these draws.
        use_cpu (`bool`, *optional*, defaults to `False`): Stay on the CPU even if an accelerator is there.
    """

    prepared_dir: str
    model_dirs: list[str]
    per_device_eval_batch_size: int = 256
    bootstrap_resamples: int = 1000
    seed: int = 0
    use_cpu: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("per_device_eval_batch_size", "bootstrap_resamples"))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EvaluateArguments, argv)
    inputs = {"prepared_dir": arguments.prepared_dir} | {f"model_dirs[{path}]": path for path in arguments.model_dirs}
    with tempfile.TemporaryDirectory() as unused:
        # Before anything asks which process this is: these find the device, and the other processes with it.
        training_arguments = TrainingArguments(
            unused,
            per_device_eval_batch_size=arguments.per_device_eval_batch_size,
            use_cpu=arguments.use_cpu,
            report_to="none",
        )
        run = StageRun("evaluate", arguments, inputs=inputs)
        check_model_dirs([Path(path) for path in arguments.model_dirs])
        if not run.is_up_to_date():
            evaluate_models(arguments, training_arguments, run)
    if PartialState().is_main_process:
        complete_cards(arguments)
        print("\n" + (Path(arguments.output_dir) / "results.md").read_text(encoding="utf-8"), flush=True)


def check_model_dirs(directories: list[Path]) -> None:
    """
    Raises:
        FileNotFoundError: If a directory is not that of a stage that has finished.
        ValueError: If the stage that wrote a directory makes nothing that ranks, or two have the same name, which
            names them in the results.
    """
    for directory in directories:
        if not (directory / RECORD_NAME).is_file():
            raise FileNotFoundError(
                f"'{directory}' has no {RECORD_NAME}; give --model_dirs the directories of stages that have finished."
            )
        stage = StageRecord.load(directory).stage
        if stage not in RANKING_STAGES:
            raise ValueError(
                f"'{directory}' was written by the stage '{stage}'; give --model_dirs the directories of "
                f"{' and '.join(RANKING_STAGES)}."
            )
    names = ["popularity", *(directory.name for directory in directories)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"Two models are called '{repeated}'; evaluate them apart, or rename one of --model_dirs.")


def evaluate_models(arguments: EvaluateArguments, training_arguments: TrainingArguments, run: StageRun) -> None:
    """Writes `results.json` (what [`results_of`] returns and whether the data are synthetic, by model) and
    `results.md`, and the rank of every user's target to `ranks/<split>.parquet`."""
    directories = [Path(path) for path in arguments.model_dirs]
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        ranks = {"popularity": {split: popularity_ranks(data, split) for split in SPLITS}}
        for directory in directories:
            ranks[directory.name] = model_ranks(directory, data, training_arguments)
        if not PartialState().is_main_process:
            return
        results = {name: results_of(by_split, data, arguments) for name, by_split in ranks.items()}
        run.metrics.update(results)
        run.details.update(data=data.statistics)
        (staging / "ranks").mkdir()
        for split in SPLITS:
            sequences = data.sequences(split)
            columns = {"user_id": sequences.user_ids, "target": sequences.targets}
            columns |= {name: by_split[split].astype(np.int32) for name, by_split in ranks.items()}
            pq.write_table(pa.table(columns), staging / "ranks" / f"{split}.parquet")
        # With every model, for whoever takes the figures of one.
        marked = {name: {"synthetic": data.statistics["synthetic"]} | result for name, result in results.items()}
        (staging / "results.json").write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        (staging / "results.md").write_text(results_page(results, data.statistics), encoding="utf-8")


def complete_cards(arguments: EvaluateArguments) -> None:
    """Adds the published figures to the records and cards that do not have them yet: those of a checkpoint that was
    just ranked, or whose stage has since written it again, or that an interrupted run did not come to."""
    results = StageRecord.load(arguments.output_dir).metrics
    for directory in map(Path, arguments.model_dirs):
        known = StageRecord.load(directory).metrics
        if known | results[directory.name] != known:
            add_metrics(directory, results[directory.name])


def model_ranks(
    directory: Path, data: PreparedDataset, training_arguments: TrainingArguments
) -> dict[str, np.ndarray]:
    """
    Rank of every user's target by split, `(users,)` in the order of the prepared users, from one checkpoint.

    Raises:
        ValueError: If the checkpoint was trained on another catalogue.
    """
    model: PreTrainedModel = AutoModel.from_pretrained(directory)
    if model.config.num_items != data.num_items:
        raise ValueError(
            f"'{directory}' knows {model.config.num_items} items, but '{data.path}' has {data.num_items}; "
            "evaluate it on the data it was trained on."
        )
    trainer_class = SASRecTrainer if isinstance(model, SASRecForSequentialRecommendation) else MMESIDTrainer
    trainer = trainer_class(model, training_arguments)
    ranks = {}
    for split in SPLITS:
        histories = EvaluationHistories(data.sequences(split))
        predicted = trainer.predict(histories)
        # Each user once and in order, however many processes shared the work.
        if not np.array_equal(predicted.label_ids, histories.sequences.targets[histories.order]):
            raise AssertionError(f"The ranks of '{directory}' on {split} do not belong to its users one by one.")
        ranks[split] = np.empty_like(predicted.predictions)
        ranks[split][histories.order] = predicted.predictions
    return ranks


def popularity_ranks(data: PreparedDataset, split: str, batch_size: int = 1024) -> np.ndarray:
    """Rank of every user's target, `(users,)`, by the number of training interactions, under the same masking and tie
    rule as every model."""
    sequences = data.sequences(split)
    popularity = data.frequencies.float()
    popularity[0] = -torch.inf
    ranks = []
    for start in tqdm(range(0, len(sequences), batch_size), desc=f"Popularity on {split}", leave=False):
        users = [sequences[index] for index in range(start, min(start + batch_size, len(sequences)))]
        scores = popularity.repeat(len(users), 1)
        mask_histories(scores, pad_histories([user["history"] for user in users]))
        ranks.append(target_ranks(scores, torch.tensor([user["target"] for user in users])).numpy())
    return np.concatenate(ranks)


def results_of(ranks: dict[str, np.ndarray], data: PreparedDataset, arguments: EvaluateArguments) -> dict[str, dict]:
    """
    What one model's ranks, `(users,)` by split, amount to.

    Returns:
        `dict[str, dict]`: `hr@k`, `ndcg@k` and `mrr` of each split; `test_confidence`, the 95% interval of each of
        them on the test split; `test_by_frequency` and `test_by_history_length`, users and metrics by group.
    """
    test = data.sequences("test")
    return {split: metrics(ranks[split]) for split in SPLITS} | {
        "test_confidence": confidence_intervals(ranks["test"], arguments.seed, arguments.bootstrap_resamples),
        "test_by_frequency": metrics_by_frequency(ranks["test"], test.targets, data.frequencies.numpy()),
        "test_by_history_length": metrics_by_history_length(ranks["test"], np.diff(test.offsets)),
    }


def results_page(results: dict[str, dict[str, dict]], statistics: dict) -> str:
    """The results as Markdown: a table of all metrics a split, and nDCG@10 on test by group; labelled where the data
    are synthetic."""
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
    lines += [
        f"### Test, nDCG@10 by group (users){label}",
        "",
        *_table(
            ["95% interval", *columns],
            {name: [f"{low:.4f} to {high:.4f}", *rows[name]] for name, (low, high) in intervals.items()},
        ),
        "",
        "The interval is a bootstrap over users. Targets are cold if the training split never has them, head if they "
        f"are among the {HEAD_SHARE:.0%} of the items it has most often, else tail; numbers are items in the history.",
        "",
    ]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: dict[str, Sequence[float | str]]) -> list[str]:
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [value if isinstance(value, str) else f"{value:.4f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    run_as_script("evaluate", main)

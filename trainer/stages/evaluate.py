"""
Ranks the whole catalogue for every held-out user and writes one table: popularity, SASRec, the recommenders.

    mmesid evaluate --prepared_dir runs/quickstart/prepared --model_dirs runs/quickstart/sasrec
    runs/quickstart/recommender \
        --output_dir runs/quickstart/evaluation
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, TrainingArguments

from hub_cards import save_card
from modeling_mmesid import SASRecForSequentialRecommendation
from modeling_mmesid.recommendation import mask_histories, pad_histories, target_ranks

from ..arguments import EvaluateArguments, parse
from ..data.prepared import PreparedDataset, Sequences
from ..data.windows import EvaluationHistories
from ..metrics.ranking.ranking import Ranking
from ..mmesid_trainer import MMESIDTrainer
from ..records import StageRecord, StageRun
from ..sasrec_trainer import SASRecTrainer


SPLITS = ("validation", "test")
COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EvaluateArguments, argv)
    inputs = {"prepared_dir": arguments.prepared_dir} | {f"model_dirs[{path}]": path for path in arguments.model_dirs}
    run = StageRun("evaluate", arguments, inputs=inputs)
    if not run.is_up_to_date():
        evaluate_models(arguments, run)
    if PartialState().is_main_process:
        print("\n" + (Path(arguments.output_dir) / "results.md").read_text(encoding="utf-8"), flush=True)


def evaluate_models(arguments: EvaluateArguments, run: StageRun) -> None:
    """
    Writes `results.json` and `results.md`, and the figures into the cards of the checkpoints.

    Raises:
        ValueError: If two checkpoints have the same directory name, which names them in the results.
    """
    directories = [Path(path) for path in arguments.model_dirs]
    names = [directory.name for directory in directories]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"Two of --model_dirs are called '{repeated}'; evaluate them apart, or rename one.")
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        results = {"popularity": {split: popularity_metrics(data, split) for split in SPLITS}}
        for directory in directories:
            results[directory.name] = evaluate_model(directory, data, arguments)
        run.metrics.update(results)
        run.details.update(data=data.statistics)
        if PartialState().is_main_process:
            (staging / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            (staging / "results.md").write_text(results_table(results, data.statistics), encoding="utf-8")
            for directory in directories:
                record = StageRecord.load(directory)
                record.metrics |= results[directory.name]
                save_card(directory, dataclasses.asdict(record))


def evaluate_model(
    directory: Path, data: PreparedDataset, arguments: EvaluateArguments
) -> dict[str, dict[str, float]]:
    """
    HR, nDCG and MRR of one checkpoint by split.

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
    with tempfile.TemporaryDirectory() as unused:
        training_arguments = TrainingArguments(
            unused,
            per_device_eval_batch_size=arguments.per_device_eval_batch_size,
            use_cpu=arguments.use_cpu,
            report_to="none",
        )
        trainer = trainer_class(model, training_arguments)
        return {split: trainer.rank(EvaluationHistories(data.sequences(split))) for split in SPLITS}


def popularity_metrics(data: PreparedDataset, split: str, batch_size: int = 1024) -> dict[str, float]:
    """Metrics of ranking by the number of training interactions, under the same masking and tie rule as every
    model."""
    sequences: Sequences = data.sequences(split)
    popularity = data.frequencies.float()
    popularity[0] = -torch.inf
    metric = Ranking(keep_in_memory=True)
    for start in tqdm(range(0, len(sequences), batch_size), desc=f"Popularity on {split}", leave=False):
        users = [sequences[index] for index in range(start, min(start + batch_size, len(sequences)))]
        scores = popularity.repeat(len(users), 1)
        mask_histories(scores, pad_histories([user["history"] for user in users]))
        metric.add_batch(ranks=target_ranks(scores, torch.tensor([user["target"] for user in users])).numpy())
    return metric.compute()


def results_table(results: dict[str, dict[str, dict[str, float]]], statistics: dict) -> str:
    """The results as Markdown, one table a split, labelled where the data are synthetic."""
    label = " (synthetic data: the figures say nothing about real users)" if statistics["synthetic"] else ""
    lines = []
    for split in SPLITS:
        lines += [
            f"### {split.capitalize()}{label}",
            "",
            "| model | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for name, by_split in results.items():
            lines.append(f"| {name} | " + " | ".join(f"{by_split[split][column]:.4f}" for column in COLUMNS) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

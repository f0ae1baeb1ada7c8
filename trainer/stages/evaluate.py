"""
Ranks the whole catalogue for every held-out user and writes one table: popularity, SASRec, the recommenders.

    mmesid evaluate --prepared_dir runs/quickstart/prepared --output_dir runs/quickstart/evaluation \
        --model_dirs runs/quickstart/sasrec runs/quickstart/recommender
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from transformers import AutoModel, TrainingArguments

from modeling_mmesid import MMESIDConfig, SASRecConfig
from modeling_mmesid.checkpoints import read_config

from ..data.prepared import PreparedDataset
from ..publishing.repository import add_metrics
from ..recommender.evaluation import POPULARITY, SPLITS, model_ranks, popularity_ranks, results_page, summarize
from ..running.arguments import DeviceArguments, ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import RECORD_NAME, StageRecord, StageRun, require_exists


RANKING_STAGES = ("sasrec", "finetune")
RANKING_MODELS = (SASRecConfig.model_type, MMESIDConfig.model_type)


@dataclass(kw_only=True)
class EvaluateArguments(ReaderArguments, DeviceArguments):
    """
    Rank the whole catalogue for every held-out user, with popularity, SASRec and the recommenders side by side.

    Args:
        > Data

        model_dirs (`list[str]`): Directories written by `mmesid sasrec` and `mmesid finetune`.

        > Computation

        per_device_eval_batch_size (`int`, *optional*, defaults to `256`): Users that a device ranks at a time.
        bootstrap_resamples (`int`, *optional*, defaults to `1000`): Draws of all users that the confidence intervals
            come from.
        seed (`int`, *optional*, defaults to `0`): Seed of these draws.
    """

    model_dirs: list[str]
    per_device_eval_batch_size: int = 256
    bootstrap_resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("per_device_eval_batch_size", "bootstrap_resamples"), not_negative=("seed",))
        names = [POPULARITY, *(Path(path).name for path in self.model_dirs)]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(
                f"Two models are called '{repeated}'; evaluate them apart, or rename one of --model_dirs."
            )


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
        check_model_dirs([Path(path) for path in arguments.model_dirs])
        run = StageRun("evaluate", arguments, inputs=inputs)
        if not run.is_up_to_date():
            evaluate_models(arguments, training_arguments, run)
    if PartialState().is_main_process:
        complete_cards(arguments)
        print("\n" + (Path(arguments.output_dir) / "results.md").read_text(encoding="utf-8"), flush=True)


def check_model_dirs(directories: list[Path]) -> None:
    """Raises `FileNotFoundError` if a directory is not that of a stage that has finished, and `ValueError` if that
    stage makes nothing that ranks."""
    for directory in directories:
        require_exists(directory / RECORD_NAME)
        stage = StageRecord.load(directory).stage
        if stage not in RANKING_STAGES:
            raise ValueError(
                f"'{directory}' was written by the stage '{stage}'; give --model_dirs the directories of "
                f"{' and '.join(RANKING_STAGES)}."
            )


def evaluate_models(arguments: EvaluateArguments, training_arguments: TrainingArguments, run: StageRun) -> None:
    """Writes `results.json` (what [`summarize`] returns and whether the data are synthetic, by model) and
    `results.md`, and the rank of every user's target to `ranks/<split>.parquet`."""
    directories = [Path(path) for path in arguments.model_dirs]
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        ranks = {POPULARITY: {split: popularity_ranks(data, split) for split in SPLITS}}
        for directory in directories:
            # The settings that its file has, before anything of it is believed.
            kind = read_config(directory).get("model_type")
            if kind not in RANKING_MODELS:
                raise ValueError(
                    f"'{directory}' holds a model of the type '{kind}', and those that rank are "
                    f"{' and '.join(RANKING_MODELS)}; correct --model_dirs."
                )
            model = AutoModel.from_pretrained(directory, trust_remote_code=False)
            ranks[directory.name] = {split: model_ranks(model, data, split, training_arguments) for split in SPLITS}
        if not PartialState().is_main_process:
            return
        results = {
            name: summarize(by_split, data, arguments.seed, arguments.bootstrap_resamples)
            for name, by_split in ranks.items()
        }
        run.metrics.update(results)
        run.details.update(data=data.statistics)
        (staging / "ranks").mkdir()
        for split in SPLITS:
            sequences = data.sequences(split)
            columns = {"user_id": sequences.user_ids, "target": sequences.targets}
            columns |= {name: by_split[split].astype(np.int32) for name, by_split in ranks.items()}
            pq.write_table(pa.table(columns), staging / "ranks" / f"{split}.parquet")
        # With every model, because users may take the figures of one alone.
        marked = {name: {"synthetic": data.statistics["synthetic"]} | result for name, result in results.items()}
        (staging / "results.json").write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        (staging / "results.md").write_text(results_page(results, data.statistics), encoding="utf-8")


def complete_cards(arguments: EvaluateArguments) -> None:
    """Adds the published figures to the records and cards that do not have them yet: those of a checkpoint that was
    just ranked, or whose stage has since written it again, or that an interrupted run did not come to."""
    results = StageRecord.load(arguments.output_dir).metrics
    for directory in map(Path, arguments.model_dirs):
        add_metrics(directory, results[directory.name])


if __name__ == "__main__":
    run_as_script("evaluate", main)

"""
Ranks the whole catalogue for every held-out user and writes one table: baselines, SASRec, the recommenders.

    mmesid evaluate --prepared_dir runs/quickstart/prepared --output_dir runs/quickstart/evaluation \
        --embeddings_dir runs/quickstart/embeddings \
        --model_dirs runs/quickstart/sasrec runs/quickstart/recommender \
        --sums both=runs/quickstart/sasrec+runs/quickstart/recommender
"""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from transformers import AutoModel, PreTrainedModel

from mmesid.hub_cards.figures import draw_results
from modeling_mmesid import MMESIDConfig, SASRecConfig
from modeling_mmesid.checkpoints import read_config

from ..data.prepared import PreparedDataset
from ..data.tables import load_table, table_path
from ..publishing.repository import add_metrics
from ..recommender.evaluation import (
    BASELINES,
    SPLITS,
    TEXT_BASELINES,
    baseline_ranks,
    model_ranks,
    require_own_name,
    results_page,
    summarize_all,
)
from ..running.arguments import DeviceArguments, JsonArguments, ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import RECORD_NAME, StageRecord, StageRun, require_exists


RANKING_STAGES = ("sasrec", "finetune")
RANKING_MODELS = (SASRecConfig.model_type, MMESIDConfig.model_type)
TEXT = "text"


@dataclass(kw_only=True)
class EvaluateArguments(ReaderArguments, DeviceArguments, JsonArguments):
    """
    Rank the whole catalogue for every held-out user, with baselines, SASRec and the recommenders side by side.

    Args:
        > Data

        model_dirs (`list[str]`, *optional*): Directories written by `mmesid sasrec` and `mmesid finetune`.
        sums (`list[str]`, *optional*): Models whose scores are added, name=directory+directory, or one that gets
            another name, name=directory. In a recipe the names of its runs stand for their directories, and one that
            is repeated for that of the next seed, which `mmesid reproduce` has.
        baselines (`list[str]`, *optional*): Which of popularity, co_occurrence (the users of an item and of the
            history's), text_neighbours and transitions (successors in training, ordered by their texts) to rank by; by
            default all, the last two if --embeddings_dir has the table text, which they read.
        embeddings_dir (`str`, *optional*): Directory of the tables written by `mmesid embed`.

        > Computation

        per_device_eval_batch_size (`int`, *optional*, defaults to `256`): Users that a device ranks at a time.
        bootstrap_resamples (`int`, *optional*, defaults to `1000`): Draws of all users that the confidence intervals
            come from.
        seed (`int`, *optional*, defaults to `0`): Seed of these draws.
    """

    model_dirs: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    baselines: list[str] | None = None
    embeddings_dir: str | None = None
    per_device_eval_batch_size: int = 256
    bootstrap_resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        if self.baselines is None:
            has_text = self.embeddings_dir is not None and table_path(self.embeddings_dir, TEXT).is_file()
            self.baselines = [name for name in BASELINES if has_text or name not in TEXT_BASELINES]
        super().__post_init__()
        check_ranges(self, positive=("per_device_eval_batch_size", "bootstrap_resamples"), not_negative=("seed",))
        for name in self.baselines:
            if name not in BASELINES:
                raise ValueError(f"--baselines names '{name}'; choose of {', '.join(BASELINES)}.")
        if self.reads_text and self.embeddings_dir is None:
            raise ValueError(f"--baselines {' '.join(TEXT_BASELINES)} read texts; give --embeddings_dir too.")
        self.models = {Path(path).name: [path] for path in self.model_dirs} | dict(map(parse_sum, self.sums))
        names = [*(Path(path).name for path in self.model_dirs), *(parse_sum(one)[0] for one in self.sums)]
        for name in names:
            require_own_name(name)
            if names.count(name) > 1:
                raise ValueError(
                    f"Two models are called '{name}'; evaluate them apart, or rename one of --model_dirs or --sums."
                )
        if not names and not self.baselines:
            raise ValueError("Nothing is to be ranked; give --model_dirs, --sums or --baselines.")

    @property
    def reads_text(self) -> bool:
        return not set(TEXT_BASELINES).isdisjoint(self.baselines)


def parse_sum(text: str) -> tuple[str, list[str]]:
    """Name and directories of a sum, name=directory+directory; raises `ValueError` for another form."""
    name, separator, directories = text.partition("=")
    parts = directories.split("+")
    if not separator or not name or not all(parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--sums {text} does not have the form name=directory+directory, of different models.")
    return name, parts


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EvaluateArguments, argv)
    # Before anything asks which process this is.
    PartialState(cpu=arguments.use_cpu)
    directories = list(dict.fromkeys(path for paths in arguments.models.values() for path in paths))
    check_model_dirs([Path(path) for path in directories])
    inputs = {"prepared_dir": arguments.prepared_dir} | {f"model_dirs[{path}]": path for path in directories}
    if arguments.reads_text:
        inputs["embeddings_dir"] = str(table_path(arguments.embeddings_dir, TEXT))
    # With --json the results alone go to the standard output, where another program reads them.
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        run = StageRun("evaluate", arguments, inputs=inputs)
        if not run.is_up_to_date():
            evaluate_models(arguments, run)
        if PartialState().is_main_process:
            complete_cards(arguments)
    if PartialState().is_main_process:
        name = "results.json" if arguments.json else "results.md"
        text = (Path(arguments.output_dir) / name).read_text(encoding="utf-8")
        print(text if arguments.json else f"\n{text}", flush=True)


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


def evaluate_models(arguments: EvaluateArguments, run: StageRun) -> None:
    """Writes `results.json` (what [`summarize_all`] returns, whether the data are synthetic and what training took, by
    model), `results.md` and `figures/results.png`, and the rank of every user's target to
    `ranks/<split>.parquet`."""
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        text = None
        if arguments.reads_text:
            text = load_table(table_path(arguments.embeddings_dir, TEXT), TEXT, data.num_items)
        ranks = {name: baseline_ranks(name, data, text) for name in arguments.baselines}
        for name, paths in arguments.models.items():
            ranks[name] = ranks_of(paths, data, arguments.per_device_eval_batch_size)
        if not PartialState().is_main_process:
            return
        results = summarize_all(ranks, list(arguments.models), data, arguments.seed, arguments.bootstrap_resamples)
        run.metrics.update(results)
        run.details.update(data=data.statistics)
        (staging / "ranks").mkdir()
        for split in SPLITS:
            sequences = data.sequences(split)
            columns = {"user_id": sequences.user_ids, "target": sequences.targets}
            columns |= {name: by_split[split].astype(np.int32) for name, by_split in ranks.items()}
            pq.write_table(pa.table(columns), staging / "ranks" / f"{split}.parquet")
        # With every model, because users may take the figures of one alone.
        marked = {
            name: {
                "synthetic": data.statistics["synthetic"],
                "trainings": [training_of(Path(path)) for path in arguments.models.get(name, [])],
            }
            | result
            for name, result in results.items()
        }
        (staging / "results.json").write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        (staging / "results.md").write_text(results_page(results, data.statistics), encoding="utf-8")
        draw_results(
            staging / "figures" / "results.png",
            {name: result["test"]["ndcg@10"] for name, result in results.items()},
            {name: result["test_confidence"]["ndcg@10"] for name, result in results.items()},
            "nDCG@10 on test, with 95% intervals",
        )


def ranks_of(directories: list[str], data: PreparedDataset, batch_size: int) -> dict[str, np.ndarray]:
    """What [`model_ranks`] says of the sum of these models, by split. They are gone before others are loaded: a device
    that holds one decoder may have no room for two."""
    models = [load_model(Path(directory)) for directory in directories]
    return {split: model_ranks(models, data, split, batch_size) for split in SPLITS}


def load_model(directory: Path) -> PreTrainedModel:
    """A model that ranks, on this process's device; raises `ValueError` if the directory holds another one."""
    # The settings that its file has, before anything of it is believed.
    kind = read_config(directory).get("model_type")
    if kind not in RANKING_MODELS:
        raise ValueError(
            f"'{directory}' holds a model of the type '{kind}', and those that rank are "
            f"{' and '.join(RANKING_MODELS)}; correct --model_dirs."
        )
    return AutoModel.from_pretrained(directory, trust_remote_code=False).to(PartialState().device)


def training_of(directory: Path) -> dict:
    """What the record of a model says of its training, so that nobody needs the model to compare it."""
    record = StageRecord.load(directory)
    return {
        "stage": record.stage,
        "seed": record.arguments.get("seed", 42),
        "modalities": record.details.get("modalities", []),
        "parameters": record.details.get("parameters"),
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "hardware": record.hardware,
    }


def complete_cards(arguments: EvaluateArguments) -> None:
    """Adds the published figures to the records and cards that do not have them yet: those of a checkpoint that was
    just ranked, or whose stage has since written it again, or that an interrupted run did not come to."""
    record = StageRecord.load(arguments.output_dir)
    for directory in map(Path, arguments.model_dirs):
        add_metrics(directory, record.metrics[directory.name], record.metrics, record.finished_at)


if __name__ == "__main__":
    run_as_script("evaluate", main)

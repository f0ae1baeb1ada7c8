"""
Compares evaluations of several models and seeds: means and spread, paired tests, groups of items, cost, as Markdown,
CSV and plots.

    mmesid compare --prepared_dir runs/beauty/prepared --output_dir runs/beauty/comparison \
        --evaluation_dirs runs/beauty/baselines runs/beauty/seed-*/evaluation/*
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from ..data.prepared import PreparedDataset
from ..recommender.evaluation import SPLITS
from ..recommender.report import (
    best_baseline,
    comparisons_table,
    groups_table,
    read_evaluations,
    report_page,
    runs_table,
)
from ..recommender.report_figures import draw_differences, draw_groups, draw_models
from ..running.arguments import ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import RECORD_NAME, StageRecord, StageRun, require_exists


@dataclass(kw_only=True)
class CompareArguments(ReaderArguments):
    """
    Compare evaluations of several models and seeds: tables, tests and plots.

    Args:
        > Data

        evaluation_dirs (`list[str]`): Directories written by `mmesid evaluate`; a model that is in several counts as
            the same with other seeds.
        baselines (`list[str]`, *optional*): Models that count as baselines besides those whose items are IDs alone.
        against (`list[str]`, *optional*): Models that all others are compared with besides the best baseline, which is
            chosen on validation.

        > Computation

        bootstrap_resamples (`int`, *optional*, defaults to `10000`): Draws of all users that intervals and p-values
            come from.
        seed (`int`, *optional*, defaults to `0`): Seed of these draws.
    """

    evaluation_dirs: list[str]
    baselines: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    bootstrap_resamples: int = 10_000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("bootstrap_resamples",), not_negative=("seed",))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(CompareArguments, argv)
    directories = [Path(path) for path in arguments.evaluation_dirs]
    for directory in directories:
        require_exists(directory / RECORD_NAME)
        record = StageRecord.load(directory)
        if record.stage != "evaluate":
            raise ValueError(
                f"'{directory}' was written by the stage '{record.stage}'; give the directories of evaluate."
            )
        for name in record.outputs:
            if not record.is_as_written(directory, name):
                raise ValueError(f"'{directory / name}' is not as it was written; evaluate its models again.")
    run = StageRun(
        "compare",
        arguments,
        {"prepared_dir": arguments.prepared_dir, "evaluation_dirs": arguments.evaluation_dirs},
    )
    if not run.is_up_to_date():
        compare(arguments, directories, run)
    if PartialState().is_main_process:
        print("\n" + (Path(arguments.output_dir) / "results.md").read_text(encoding="utf-8"), flush=True)


def compare(arguments: CompareArguments, directories: list[Path], run: StageRun) -> None:
    """Writes `results.md`, `runs.csv`, `comparisons.csv`, `groups.csv` and the plots."""
    data = PreparedDataset.load(arguments.prepared_dir)
    sequences = {split: data.sequences(split) for split in SPLITS}
    models = read_evaluations(directories, {split: one.user_ids for split, one in sequences.items()})
    for flag, names in (("baselines", arguments.baselines), ("against", arguments.against)):
        for name in names:
            if name not in models:
                raise ValueError(f"--{flag} names '{name}', which is not evaluated; choose of {', '.join(models)}.")
    with run as staging:
        runs = runs_table(models)
        without_content = [name for name, ones in models.items() if not any(one.has_content for one in ones)]
        baselines = [name for name in models if name in without_content or name in arguments.baselines]
        references = [best_baseline(runs, baselines)] if baselines else []
        # Others than baselines are held against the best of these, and all models against what the user names.
        pairs = [(name, one) for one in references for name in models if name not in baselines]
        pairs += [(name, one) for one in arguments.against if one not in references for name in models if name != one]
        resamples = arguments.bootstrap_resamples
        comparisons = comparisons_table(models, pairs, arguments.seed, resamples)
        groups = groups_table(models, data.frequencies.numpy()[sequences["test"].targets])
        for name, table in (("runs", runs), ("comparisons", comparisons), ("groups", groups)):
            table.to_csv(staging / f"{name}.csv", index=False)
        figures = [draw_models(staging, runs, baselines)]
        figures += [draw_differences(staging, comparisons)] if pairs else []
        figures.append(draw_groups(staging, groups))
        page = report_page(runs, comparisons, groups, baselines, data.statistics, resamples, figures)
        (staging / "results.md").write_text(page, encoding="utf-8")
        run.details.update(data=data.statistics, baselines=baselines, best_baseline=next(iter(references), None))


if __name__ == "__main__":
    run_as_script("compare", main)

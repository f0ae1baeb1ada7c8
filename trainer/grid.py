"""
A recipe for several seeds: every run of every stage, once by its record, in processes side by side.

What no seed changes (the prepared dataset, embeddings by encoders that the recipe does not train, baselines that
nobody trains) lies in the recipe's `output_dir`, all else in `seed-<seed>` below it.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from .recipes import RANKING_STAGES, Stage, name_of, parts_of, plan
from .running.files import to_flags


SEEDED_STAGES = ("sasrec", "encoder", "quantize", "finetune")
# A server imports what the stages import and forks for every run: new processes without the seconds of the imports.
START_METHOD = "forkserver"
PRELOADED = ["mmesid.trainer.stages.finetune", "mmesid.trainer.stages.evaluate"]


class Run(NamedTuple):
    """One execution of a stage: what the screen and its log call it, and the directories that it reads."""

    name: str
    stage: str
    settings: dict
    reads: frozenset[str]

    @property
    def writes(self) -> str:
        return self.settings["output_dir"]


class Grid(NamedTuple):
    """
    The runs of a recipe, each behind those that it waits for, the comparison that follows them, and what is left out
    because there is one seed alone. `links` are symbolic links to tables that the seeds share, by path.
    """

    runs: list[Run]
    comparison: Run
    links: dict[Path, Path]
    left_out: list[str]


def plan_grid(path: Path, recipe: dict, stages: Mapping[str, Stage], seeds: Sequence[int]) -> Grid:
    """
    The grid of a recipe (see [`~mmesid.trainer.recipes.read_recipe`]) for these seeds. Every model and every sum of
    models is evaluated by itself, so that another variant does not rank the others again.

    Raises:
        ValueError: If a seed is named twice, the recipe sets seeds itself, nothing in it ranks, or two runs have one
        name.
    """
    _check(path, recipe, seeds)
    root = Path(recipe["output_dir"])
    runs: dict[str, Run] = {}
    links: dict[Path, Path] = {}
    evaluate, compare = ((recipe.get(stage) or [{}])[0] for stage in ("evaluate", "compare"))
    common = {
        key: value for key, value in evaluate.items() if key not in ("model_dirs", "sums", "baselines", "output_dir")
    }
    common["prepared_dir"] = str(root / "prepared")
    models = {
        name_of(stage, settings, stages): settings.get("output_dir") or str(stages[stage].writes)
        for stage in RANKING_STAGES
        for settings in recipe.get(stage, ())
    }

    def add(run: Run) -> None:
        """What no seed changes comes with each of them; anything else that has a name again is another run."""
        same = runs.setdefault(run.name, run)
        if same is not run and (same.writes != run.writes or run.stage == "evaluate"):
            raise ValueError(
                f"Two runs of '{path}' would be called '{run.name}'; give each an output_dir that ends in a name of "
                "its own, and each sum a name that no model has."
            )

    for seed in seeds:
        below = root / f"seed-{seed}"
        for stage, settings in plan(path, recipe | {"output_dir": str(below)}, stages):
            if stage not in ("prepare", "embed", *SEEDED_STAGES):
                continue
            written = Path(settings["output_dir"])
            what = written.name
            if stage == "embed":
                modality = settings["modality"]
                what = modality if what == stages[stage].writes else f"{modality} {what}"
            name = stage if what in (stage, "prepared") else f"{stage} {what}"
            if stage != "prepare":
                settings["prepared_dir"] = common["prepared_dir"]
            if stage in SEEDED_STAGES:
                settings["seed"] = seed
            if stage in SEEDED_STAGES or str(settings.get("model_name_or_path")).startswith(f"{below}/"):
                name = f"seed {seed}: {name}"
            else:
                settings["output_dir"] = str(root / written.relative_to(below))
                if stage == "embed":
                    for file in (f"{modality}.safetensors", f"{modality}.json"):
                        links[written / file] = Path(settings["output_dir"]) / file
            add(_run(name, stage, settings))
        for model, directory in models.items():
            settings = common | {"baselines": [], "model_dirs": [str(below / directory)]}
            add(_evaluation(root, seed, model, settings))
    settings = common | {"output_dir": str(root / "baselines")}
    # Models that the recipe does not train are ranked once.
    settings |= {key: evaluate[key] for key in ("baselines", "model_dirs") if key in evaluate}
    settings |= {"embeddings_dir": str(root / "embeddings")} if "embed" in recipe else {}
    runs["baselines"] = _run("baselines", "evaluate", settings)
    left_out = []
    for model, parts in map(parts_of, evaluate.get("sums", ())):
        of_seeds = _directories(parts, models, root, seeds)
        if not of_seeds:
            left_out.append(f"{model}, which takes more seeds")
        for seed, directories in of_seeds.items():
            settings = common | {"baselines": [], "sums": [f"{model}={'+'.join(directories)}"]}
            add(_evaluation(root, seed, model, settings))
    evaluated = [run.writes for run in runs.values() if run.stage == "evaluate" and run.name != "baselines"]
    settings = compare | {
        "prepared_dir": common["prepared_dir"],
        "evaluation_dirs": [runs["baselines"].writes, *evaluated],
        "output_dir": str(root / name_of("compare", compare, stages)),
    }
    return Grid(_through_links(runs.values(), links), _run("compare", "compare", settings), links, left_out)


def _evaluation(root: Path, seed: int, model: str, settings: dict) -> Run:
    written = str(root / f"seed-{seed}" / "evaluation" / model)
    return _run(f"seed {seed}: evaluate {model}", "evaluate", settings | {"output_dir": written})


def _directories(
    parts: Sequence[str], models: Mapping[str, str], root: Path, seeds: Sequence[int]
) -> dict[int, list[str]]:
    """The directories of a sum's parts for every seed: of a model that is named twice, the second is that of the seed
    behind it. Each set of directories comes once (of two seeds there is one pair); there is none if there are more
    parts than seeds."""
    repeats = [parts[:place].count(part) for place, part in enumerate(parts)]
    if max(repeats) >= len(seeds):
        return {}
    found: dict[frozenset[str], tuple[int, list[str]]] = {}
    for number, seed in enumerate(seeds):
        directories = [
            str(root / f"seed-{seeds[(number + repeat) % len(seeds)]}" / models[part]) if part in models else part
            for part, repeat in zip(parts, repeats)
        ]
        found.setdefault(frozenset(directories), (seed, directories))
    return dict(found.values())


def _check(path: Path, recipe: dict, seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))} names a seed twice; name each once.")
    for stage in SEEDED_STAGES:
        if any("seed" in settings for settings in recipe.get(stage, ())):
            raise ValueError(f"Section '{stage}' of '{path}' sets a seed, which is what --seeds does; leave it out.")
    for stage in ("evaluate", "compare"):
        if len(recipe.get(stage, ())) > 1:
            raise ValueError(
                f"'{path}' has several runs of '{stage}', and `mmesid reproduce` plans these itself; keep one, which "
                "says how."
            )
    if not any(recipe.get(stage) for stage in RANKING_STAGES):
        raise ValueError(f"'{path}' trains nothing that ranks; add a section {' or '.join(RANKING_STAGES)}.")


def _run(name: str, stage: str, settings: dict) -> Run:
    reads = set()
    for key, value in settings.items():
        if key == "sums":
            reads |= {part for one in value for part in parts_of(one)[1]}
        elif key.endswith("_dirs"):
            reads |= set(value)
        elif key == "model_name_or_path" or (key.endswith("_dir") and key != "output_dir"):
            reads.add(value)
    if settings.get("modalities") == []:
        # Items that are ID vectors alone: none of these is read.
        reads -= {settings.get(name) for name in ("embeddings_dir", "quantizer_dir", "sasrec_dir")}
    return Run(name, stage, settings, frozenset(reads))


def _through_links(runs: Iterable[Run], links: Mapping[Path, Path]) -> list[Run]:
    """Runs that read what is behind a link, too."""
    behind: dict[str, set[str]] = {}
    for link, target in links.items():
        behind.setdefault(str(link.parent), set()).add(str(target.parent))
    return [
        run._replace(reads=run.reads.union(*(behind.get(directory, ()) for directory in run.reads))) for run in runs
    ]


def share_tables(links: Mapping[Path, Path]) -> None:
    """Makes the symbolic links of a grid, relative ones, before there is anything at their ends."""
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def execute(runs: Sequence[Run], jobs: int, logs: Path, run_stage: Callable[[str, list[str]], None]) -> set[str]:
    """
    Executes runs, at most `jobs` at a time, each in a process of its own with a log of its name in the directory
    `logs`, as soon as all runs are done whose directories it reads. What reads the directory of a run that failed is
    not started; all else is.

    Args:
        runs (`Sequence[Run]`): The runs; where several could start, the first one does.
        jobs (`int`): Processes at a time.
        logs (`Path`): Directory of the logs.
        run_stage (`Callable[[str, list[str]], None]`): Executes a stage by its name, with its flags; a function that
            new processes can import.

    Returns:
        `set[str]`: The directories of the runs that failed or were not started.
    """
    # As many threads per process as there are processors would be in each other's way. The server inherits the number.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    context: Any = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(runs), set[str]()
    running: dict[Any, tuple[Any, Run]] = {}
    try:
        while waiting or running:
            busy = {run.writes for _, run in running.values()}
            unfinished = {run.writes for run in waiting} | busy
            for run in list(waiting):
                if run.reads & failed:
                    waiting.remove(run)
                    failed.add(run.writes)
                    _tell(runs, waiting, running, run, "not started, for it reads what failed")
                elif len(running) < jobs and not run.reads & unfinished and run.writes not in busy:
                    waiting.remove(run)
                    process = context.Process(target=_work, args=(run, _log(logs, run), run_stage))
                    process.start()
                    running[process.sentinel] = process, run
                    busy.add(run.writes)
            for sentinel in wait(list(running)) if running else ():
                process, run = running.pop(sentinel)
                process.join()
                failed |= {run.writes} if process.exitcode else set()
                message = _last_line(_log(logs, run), run.stage, process.exitcode)
                _tell(runs, waiting, running, run, message)
    finally:
        for process, _ in running.values():
            process.terminate()
    return failed


def _tell(runs: Sized, waiting: Sized, running: Sized, run: Run, message: str) -> None:
    print(f"[{len(runs) - len(waiting) - len(running)}/{len(runs)}] {run.name}: {message}", flush=True)


def _log(logs: Path, run: Run) -> Path:
    return logs / f"{run.name.replace(':', '').replace(' ', '-')}.log"


def _last_line(log: Path, stage: str, exitcode: int) -> str:
    """What a stage said in the end: that it wrote, or skipped, its directory, or why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    if exitcode:
        return f"failed ({next((line for line in reversed(lines) if line.strip()), exitcode)}), see '{log}'"
    said = [line.removeprefix(f"{stage}: ") for line in lines if line.startswith(f"{stage}: ")]
    return said[-1].partition(", skipped (")[0] if said else "done"


def _work(run: Run, log: Path, run_stage: Callable[[str, list[str]], None]) -> None:
    """What the process of a run does."""
    parent: Any = multiprocessing.parent_process()
    # A run must not outlive the command: the next one would start it again, on the same directory.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_stage(run.stage, to_flags(run.settings))

"""Recipes: YAML files with a section per stage, read, overridden and planned without waiting for torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

from .running.declarations import stage_settings
from .running.files import check_names, read_yaml


# The encoders whose model a recipe's own stage writes, and those that are the usual ones of a modality.
TRAINED_ENCODERS = {"sasrec": "sasrec", "dual_encoder": "encoder"}
USUAL_ENCODERS = {"collaborative": "sasrec", "visual": "dual_encoder"}
# The stages whose models rank the catalogue.
RANKING_STAGES = ("sasrec", "finetune")


class Stage(NamedTuple):
    """What the stage makes of what, the directory below a recipe's `output_dir` that it writes to, and the setting by
    which later stages look for that directory."""

    help: str
    writes: str | None = None
    read_as: str | None = None


def packaged_recipes() -> dict[str, Path]:
    """The recipes that are installed with the package, by name."""
    files = sorted(Path(str(file)) for file in resources.files("mmesid.recipes").iterdir())
    return {file.stem: file for file in files if file.suffix == ".yaml"}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: one that is installed with the package, by its bare name, or any, by its path; raises
    `FileNotFoundError` if there is neither."""
    path = packaged_recipes().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no recipe '{name_or_path}', neither a file below '{Path.cwd()}' nor one of those that come "
            f"with mmesid: {', '.join(packaged_recipes())}; correct the path or the name."
        )
    return path


def read_recipe(path: Path, stages: Iterable[str], overrides: Iterable[str] = ()) -> dict:
    """
    Reads a recipe and applies overrides, each `stage.key=value`, set in every run of the stage, or `output_dir=value`;
    values are read as YAML.

    Returns:
        `dict`: `output_dir`, and for every stage a list of its runs, each a dictionary of settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no recipe, or an override does not fit it.
    """
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise ValueError(f"'{path}' is no recipe: it must map `output_dir` and the names of stages to their settings.")
    for name, section in recipe.items():
        if name == "output_dir":
            continue
        if name not in stages:
            raise ValueError(
                f"'{path}' has a section '{name}', which is no stage; the stages are {', '.join(stages)}."
            )
        runs = section if isinstance(section, list) else [section or {}]
        if not all(isinstance(settings, dict) for settings in runs):
            raise ValueError(f"Section '{name}' of '{path}' must map settings to values, or list such mappings.")
        # Copies: sections that YAML's anchors share are overridden apart.
        recipe[name] = [dict(settings) for settings in runs]
    for override in overrides:
        _override(recipe, path, override)
    if not isinstance(recipe.get("output_dir"), str):
        raise ValueError(f"'{path}' does not say where to write; add `output_dir: runs/<name>`.")
    return recipe


def _override(recipe: dict, path: Path, override: str) -> None:
    target, separator, text = override.partition("=")
    stage, _, key = target.partition(".")
    if not separator or (target != "output_dir" and not key):
        raise ValueError(f"--set {override} does not have the form stage.key=value; write e.g. finetune.seed=1.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"--set {override} has a value that is not YAML; put it into quotes within quotes, as in key='\"value\"'."
        ) from error
    if target == "output_dir":
        recipe["output_dir"] = value
        return
    check_section(recipe, path, stage, f"--set {override}")
    for settings in recipe[stage]:
        settings[key] = value


def check_section(recipe: dict, path: Path, stage: str, flag: str) -> None:
    """Raises `ValueError` if the stage that a flag names has no section in the recipe."""
    if stage not in recipe or stage == "output_dir":
        raise ValueError(f"{flag} names '{stage}', which is no section of '{path}'; correct the name.")


def check_paths(path: Path, recipe: dict) -> None:
    """Raises `FileNotFoundError` if the recipe names a file that lies beside it and not where its paths start, which
    is the current directory."""
    for stage, runs in recipe.items():
        for name, value in ((name, value) for run in runs if isinstance(run, dict) for name, value in run.items()):
            if name != "output_dir" and isinstance(value, str) and not Path(value).exists():
                if (path.parent / value).exists():
                    raise FileNotFoundError(
                        f"'{value}', which {stage}.{name} of '{path}' names, is not below '{Path.cwd()}', where the "
                        f"paths of a recipe start, but beside the recipe; start mmesid in '{path.parent.absolute()}'."
                    )


def name_of(stage: str, settings: Mapping, stages: Mapping[str, Stage]) -> str:
    """What a run of a stage is called: the last part of the directory that it writes to."""
    return Path(settings.get("output_dir") or stages[stage].writes or stage).name


def parts_of(text: str) -> tuple[str, list[str]]:
    """Name and parts of a sum, name=part+part."""
    name, _, parts = text.partition("=")
    return name, parts.split("+")


def is_of_two_seeds(text: str) -> bool:
    """Whether a sum, name=part+part, has a part twice, which stands for the run of the next seed."""
    parts = parts_of(text)[1]
    return len(set(parts)) < len(parts)


def _resolved(text: str, directories: Mapping[str, str]) -> str:
    name, parts = parts_of(text)
    return f"{name}={'+'.join(directories.get(part, part) for part in parts)}"


def plan(
    path: Path, recipe: dict, stages: Mapping[str, Stage], only: Iterable[str] = ()
) -> Iterator[tuple[str, dict]]:
    """
    The runs of a recipe, or of `only` these stages, in its order: the stage and its settings, directories filled in
    where the recipe leaves them out.

    A stage writes to its directory below the recipe's `output_dir` (a relative `output_dir` of its own is below it
    too) and reads from those of the other stages; a setting that names the `output_dir` of another run of the recipe
    means that directory. `evaluate` compares all models of the recipe, and `embed` reads the encoders that the recipe
    trains. A setting that is null is not passed on.

    Raises:
        ValueError: If a wanted stage has no section, a section sets what its stage does not have, or two runs would
        write to one directory or be evaluated under one name.
    """
    root = Path(recipe["output_dir"])

    def output_dir(stage: str, settings: dict) -> str:
        return str(root / (settings.get("output_dir") or stages[stage].writes or stage))

    written = {
        settings["output_dir"]: output_dir(stage, settings)
        for stage, runs in recipe.items()
        if stage != "output_dir"
        for settings in runs
        if settings.get("output_dir")
    }
    _require_own_directories(path, recipe, stages, output_dir)
    ranking = {
        name_of(stage, settings, stages): output_dir(stage, settings)
        for stage in RANKING_STAGES
        for settings in recipe.get(stage, ())
    }
    directories = {one.read_as for one in stages.values() if one.read_as is not None} | {"model_name_or_path"}
    for stage in only:
        check_section(recipe, path, stage, "--only")
    for stage, runs in recipe.items():
        if stage == "output_dir" or (only and stage not in only):
            continue
        names = stage_settings(stage)
        for settings in runs:
            check_names(settings, names, f"Section '{stage}' of '{path}'", stage)
            filled: dict = {
                one.read_as: str(root / str(one.writes)) for one in stages.values() if one.read_as in names
            }
            if "sasrec" not in recipe:
                # Nothing that `finetune` needs: its scores are added where there are any.
                filled.pop("sasrec_dir", None)
            if stage == "recommend" and not settings.keys().isdisjoint(("history", "histories_file")):
                # Users are asked for already, and those of the dataset would be others.
                del filled["prepared_dir"]
            if stage == "evaluate":
                filled["model_dirs"] = list(ranking.values())
            if stage == "compare" and "evaluate" in recipe:
                filled["evaluation_dirs"] = [output_dir("evaluate", one) for one in recipe["evaluate"]]
            if stage == "embed" and settings.get("from_file") is None:
                encoder = settings.get("encoder") or USUAL_ENCODERS.get(settings.get("modality"))
                trained = TRAINED_ENCODERS.get(str(encoder), "")
                if trained in recipe:
                    filled["model_name_or_path"] = output_dir(trained, recipe[trained][0])
            filled |= settings
            for name in directories.intersection(settings):
                filled[name] = written.get(settings[name], settings[name])
            if stage == "evaluate" and "sums" in settings:
                filled["sums"] = [_resolved(one, ranking) for one in settings["sums"] if not is_of_two_seeds(one)]
            if stages[stage].writes is not None:
                filled["output_dir"] = output_dir(stage, settings)
            yield stage, {key: value for key, value in filled.items() if value is not None}


def _require_own_directories(
    path: Path, recipe: dict, stages: Mapping[str, Stage], output_dir: Callable[[str, dict], str]
) -> None:
    """Raises `ValueError` if a run would overwrite what another one has written, or hide it in the evaluation."""
    taken: set[str] = set()
    for stage, runs in recipe.items():
        # The tables of all modalities share a directory.
        if stage in ("output_dir", "embed") or stages[stage].writes is None:
            continue
        for settings in runs:
            names = {output_dir(stage, settings)}
            if stage in RANKING_STAGES and "evaluate" in recipe:
                names.add(name_of(stage, settings, stages))
            for name in sorted(names & taken):
                raise ValueError(
                    f"Two runs of '{path}' would be '{name}'; give each an output_dir of its own, which also ends in "
                    "a name of its own."
                )
            taken |= names

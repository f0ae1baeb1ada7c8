"""
The command `mmesid`: one stage, or all stages of a recipe.

    mmesid sasrec --prepared_dir runs/mine/prepared --output_dir runs/mine/sasrec
    mmesid run examples/recipes/quickstart.yaml --set finetune.num_train_epochs=2
"""

import argparse
import dataclasses
import importlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import yaml

from .running.errors import TRACEBACK_FLAG, one_sentence, read_yaml, take_traceback_flag


# Stages are imported when they run, so that `mmesid --help` does not wait for torch.
STAGES = {
    "prepare": "interactions, texts and images -> prepared dataset",
    "sasrec": "prepared dataset -> SASRec checkpoint, the collaborative modality",
    "embed": "items of one modality -> table of embeddings",
    "quantize": "tables of embeddings -> MM-RQ-VAE checkpoint and semantic IDs",
    "finetune": "all of these -> recommender checkpoint",
    "evaluate": "recommender and baselines -> full-ranking metrics",
    "recommend": "recommender and histories -> recommendations",
    "index": "recommender -> FAISS index of its items, for retrieval",
    "push": "directory of a stage -> repository on the Hub",
}

# Where the stages of a recipe write, and under which argument later stages look for it.
OUTPUT_NAMES = {
    "prepare": "prepared",
    "sasrec": "sasrec",
    "embed": "embeddings",
    "quantize": "quantizer",
    "finetune": "recommender",
    "evaluate": "evaluation",
    "index": "index",
}
INPUT_NAMES = {
    "prepared_dir": "prepared",
    "sasrec_dir": "sasrec",
    "embeddings_dir": "embeddings",
    "quantizer_dir": "quantizer",
    "model_dir": "recommender",
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's error ends in one sentence and exit status 2, a traceback after `--traceback`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Where it is installed, every command would begin with the lack of a kernel that makes 4-bit products faster.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        prog="mmesid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Sequential recommendation with a language model, multimodal embeddings and semantic IDs.",
        epilog="commands:\n"
        + "".join(f"  {name:<10} {help}\n" for name, help in STAGES.items())
        + "  run        all stages of a recipe, skipping what is up to date\n\n"
        + "`mmesid <command> --help` explains its flags.",
    )
    parser.add_argument("--version", action="version", version=f"mmesid {version('mmesid')}")
    parser.add_argument(TRACEBACK_FLAG, action="store_true", help="show where an error comes from")
    parser.add_argument("command", choices=[*STAGES, "run"], metavar="command", help="one of the commands below")
    argv, show_traceback = take_traceback_flag(argv)
    command = parser.parse_args(argv[:1]).command
    if command == "run":
        with one_sentence(command, show_traceback):
            _run(argv[1:], show_traceback)
    else:
        _run_stage(command, argv[1:], show_traceback)


def _run_stage(stage: str, argv: list[str], show_traceback: bool) -> None:
    with one_sentence(stage, show_traceback):
        importlib.import_module(f".stages.{stage}", __package__).main(argv)


def _run(argv: list[str], show_traceback: bool) -> None:
    parser = argparse.ArgumentParser(prog="mmesid run", description="Run the stages of a recipe in its order.")
    parser.add_argument("recipe", type=Path, help="YAML file: `output_dir`, and one section a stage")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="STAGE", help="run only these sections of the recipe"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="override a setting of the recipe, in every run of the stage; `output_dir=VALUE` moves the whole recipe",
    )
    arguments = parser.parse_args(argv)
    runs = list(plan(arguments.recipe, read_recipe(arguments.recipe, arguments.set), arguments.only))

    from accelerate import PartialState

    is_main_process = PartialState().is_main_process
    for number, (stage, settings) in enumerate(runs, 1):
        if is_main_process:
            print(f"[{number}/{len(runs)}] {stage}", flush=True)
        _run_stage(stage, to_flags(settings), show_traceback)


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> dict:
    """
    Reads a recipe and applies overrides.

    Args:
        path (`Path`): The YAML file.
        overrides (`Iterable[str]`, *optional*, defaults to `()`): Each `stage.key=value`, set in every run of the
            stage, or `output_dir=value`; values are read as YAML.

    Returns:
        `dict`: `output_dir`, and for every stage a list of its runs, each a dictionary of settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no recipe, or an override does not fit it.
    """
    content = read_yaml(path, "recipe")
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is no recipe: it must map `output_dir` and the names of stages to their settings.")
    recipe = {}
    for name, section in content.items():
        if name == "output_dir":
            recipe[name] = section
            continue
        if name not in STAGES:
            raise ValueError(
                f"'{path}' has a section '{name}', which is no stage; the stages are {', '.join(STAGES)}."
            )
        runs = section if isinstance(section, list) else [section or {}]
        if not all(isinstance(settings, dict) for settings in runs):
            raise ValueError(f"Section '{name}' of '{path}' must map settings to values, or list such mappings.")
        recipe[name] = [dict(settings) for settings in runs]
    for override in overrides:
        target, separator, value = override.partition("=")
        stage, _, key = target.partition(".")
        if not separator or (target != "output_dir" and not key):
            raise ValueError(f"--set {override} does not have the form stage.key=value; write e.g. finetune.seed=1.")
        value = _override_value(override, value)
        if target == "output_dir":
            recipe["output_dir"] = value
            continue
        if stage not in recipe:
            raise ValueError(f"--set {override} names '{stage}', which is no section of '{path}'; correct the name.")
        for settings in recipe[stage]:
            settings[key] = value
    if not isinstance(recipe.get("output_dir"), str):
        raise ValueError(f"'{path}' does not say where to write; add `output_dir: runs/<name>`.")
    return recipe


def _override_value(override: str, value: str):
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"--set {override} has a value that is not YAML; put it into quotes within quotes, as in key='\"value\"'."
        ) from error


def plan(path: Path, recipe: dict, only: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """
    The runs of a recipe in its order, directories filled in where it leaves them out.

    A stage writes to its directory below the recipe's `output_dir` (a relative `output_dir` of its own is below it
    too) and reads from those of the other stages; `evaluate` compares all models of the recipe. A setting that is null
    is not passed on.

    Args:
        path (`Path`): The recipe's file, for messages.
        recipe (`dict`): As [`read_recipe`] returns it.
        only (`list[str]`, *optional*): The stages wanted.

    Yields:
        `tuple[str, dict]`: The stage and its settings.

    Raises:
        ValueError: If a wanted stage has no section, or a section sets what its stage does not have.
    """
    from .running import arguments

    classes = {
        "prepare": arguments.PrepareArguments,
        "sasrec": arguments.SASRecArguments,
        "embed": arguments.EmbedArguments,
        "quantize": arguments.QuantizeArguments,
        "finetune": arguments.FinetuneArguments,
        "evaluate": arguments.EvaluateArguments,
        "recommend": arguments.RecommendArguments,
        "index": arguments.IndexArguments,
        "push": arguments.PushArguments,
    }
    root = Path(recipe["output_dir"])

    def output_dir(stage: str, settings: dict) -> str:
        return str(root / (settings.get("output_dir") or OUTPUT_NAMES[stage]))

    models = [output_dir(stage, settings) for stage in ("sasrec", "finetune") for settings in recipe.get(stage, ())]
    for stage in only or ():
        if stage not in recipe or stage == "output_dir":
            raise ValueError(f"--only names '{stage}', which is no section of '{path}'; correct the name.")
    for stage, runs in recipe.items():
        if stage == "output_dir" or (only and stage not in only):
            continue
        fields = {field.name for field in dataclasses.fields(classes[stage])}
        for settings in runs:
            for key in settings:
                if key not in fields:
                    raise ValueError(
                        f"Section '{stage}' of '{path}' sets '{key}', which the stage does not have; "
                        f"see `mmesid {stage} --help`."
                    )
            filled = {key: str(root / name) for key, name in INPUT_NAMES.items() if key in fields}
            if stage == "evaluate":
                filled["model_dirs"] = models
            if stage == "embed" and settings.get("modality") == "collaborative":
                filled["model_name_or_path"] = str(root / OUTPUT_NAMES["sasrec"])
            filled |= settings
            if stage in OUTPUT_NAMES:
                filled["output_dir"] = output_dir(stage, settings)
            yield stage, {key: value for key, value in filled.items() if value is not None}


def to_flags(settings: dict) -> list[str]:
    """Settings as the flags that `HfArgumentParser` reads."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict | bool):
            flags.append(f"--{key}={json.dumps(value)}")
        else:
            flags.append(f"--{key}={value}")
    return flags


if __name__ == "__main__":
    main()

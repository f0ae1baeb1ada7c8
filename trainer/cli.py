"""
The command `mmesid`: one stage, all stages of a recipe, or those for several seeds.

    mmesid sasrec --prepared_dir runs/mine/prepared --output_dir runs/mine/sasrec
    mmesid run quickstart --set finetune.num_train_epochs=2
    mmesid reproduce quickstart --seeds 1 2 3
"""

import argparse
import importlib
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .grid import execute, plan_grid, share_tables
from .recipes import Stage, check_paths, find_recipe, packaged_recipes, plan, read_recipe
from .running.completion import SHELLS, completion_script
from .running.declarations import stage_settings
from .running.errors import ERROR, TRACEBACK_FLAG, UsageError, one_sentence, quiet_end, run_stage
from .running.files import to_flags
from .running.help import HELP_FLAGS
from .running.launch import join_processes, launch, split_launch_flags


# A stage is the module of that name in `stages` and a line here. It is imported when it runs: no help waits for torch.
STAGES = {
    "init": Stage("two tables -> commented recipe that runs"),
    "prepare": Stage("interactions, texts and images -> prepared dataset", "prepared", "prepared_dir"),
    "sasrec": Stage("prepared dataset -> SASRec checkpoint, the collaborative modality", "sasrec", "sasrec_dir"),
    "encoder": Stage("prepared dataset -> dual encoder of its texts and pictures", "encoder"),
    "embed": Stage("items of one modality -> table of embeddings", "embeddings", "embeddings_dir"),
    "quantize": Stage("tables of embeddings -> MM-RQ-VAE checkpoint, semantic IDs", "quantizer", "quantizer_dir"),
    "finetune": Stage("all of these -> recommender checkpoint", "recommender", "model_dir"),
    "evaluate": Stage("recommender and baselines -> full-ranking metrics", "evaluation"),
    "compare": Stage("evaluations -> means over seeds, tests, tables and plots", "comparison"),
    "recommend": Stage("recommender and histories -> recommendations"),
    "demo": Stage("recommender -> page to try it in a browser"),
    "index": Stage("recommender -> FAISS index of its items, for retrieval", "index"),
    "push": Stage("directory of a stage -> repository on the Hub"),
    "report": Stage("run of a recipe -> one page of results, curves and examples"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Exit statuses are 0, 1 after an error, which is one sentence (a traceback after
    `--traceback`), and 2 after flags that make no command; without any command those that there are are listed."""
    with quiet_end():
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mmesid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Sequential recommendation with a language model, multimodal embeddings and semantic IDs.",
        epilog="commands:\n"
        + "".join(f"  {name:<10} {stage.help}\n" for name, stage in STAGES.items())
        + "  run        all stages of a recipe, skipping what is up to date\n"
        + "  reproduce  the same for several seeds, side by side, and their comparison\n"
        + "  doctor     what is installed, and what a recipe will take, before anything starts\n"
        + "  completion script that completes all of this in a shell\n\n"
        + "`mmesid <command> --help` explains its flags; the flags of `accelerate launch` and\n"
        + "--accelerate_config run it in several processes. Exit status: 0 done, 1 an error, told in one\n"
        + "sentence, 2 flags that make no command.",
    )
    parser.add_argument("--version", action="version", version=f"mmesid {version('mmesid')}")
    parser.add_argument(TRACEBACK_FLAG, action="store_true", help="show where an error comes from")
    parser.add_argument(
        "command", choices=[*STAGES, *OTHER_COMMANDS], metavar="command", help="one of the commands below"
    )
    traceback = [TRACEBACK_FLAG] * (TRACEBACK_FLAG in argv)
    argv = [argument for argument in argv if argument != TRACEBACK_FLAG]
    if not argv:
        parser.print_help()
        return
    command, argv = parser.parse_args(argv[:1]).command, argv[1:]
    if HELP_FLAGS.isdisjoint(argv) and command in (*STAGES, "run"):
        own = {"set", "only"} if command == "run" else stage_settings(command)
        with one_sentence(command, traceback):
            launch_flags, argv = split_launch_flags(argv, own)
            if launch_flags:
                return launch(command, launch_flags, argv + traceback)
        join_processes()
    if command in OTHER_COMMANDS:
        parser_of, function = OTHER_COMMANDS[command]
        with one_sentence(command, traceback):
            function(parser_of().parse_args(argv), traceback)
    else:
        _run_stage(command, argv + traceback)


def _run_stage(stage: str, argv: list[str]) -> None:
    run_stage(stage, lambda flags: importlib.import_module(f".stages.{stage}", __package__).main(flags), argv)


def _recipe_parser(command: str, description: str, **recipe: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mmesid {command}", description=description)
    parser.add_argument(
        "recipe",
        **recipe,
        help=f"a recipe that comes with mmesid ({', '.join(packaged_recipes())}), or a YAML file: `output_dir`, and "
        "one section per stage; paths in it are relative to the directory you are in",
    )
    parser.add_argument(
        "--set",
        metavar="STAGE.KEY=VALUE",
        help="override a setting of the recipe, in every run of the stage; `output_dir=VALUE` moves the whole recipe",
        **SEVERAL,
    )
    return parser


def _run_parser() -> argparse.ArgumentParser:
    parser = _recipe_parser("run", "Run the stages of a recipe in its order.")
    parser.add_argument("--only", metavar="STAGE", help="run only these sections of the recipe", **SEVERAL)
    return parser


def _run(arguments: argparse.Namespace, traceback: list[str]) -> None:
    path = find_recipe(arguments.recipe)
    recipe = read_recipe(path, STAGES, arguments.set)
    runs = list(plan(path, recipe, STAGES, arguments.only))
    check_paths(path, recipe)

    from accelerate import PartialState

    is_main_process = PartialState().is_main_process
    for number, (stage, settings) in enumerate(runs, 1):
        if is_main_process:
            print(f"[{number}/{len(runs)}] {stage}", flush=True)
        _run_stage(stage, to_flags(settings) + traceback)
    if not arguments.only:
        prepared = (settings.get("prepared_dir", settings.get("output_dir")) for _, settings in runs)
        settings = {"run_dir": recipe["output_dir"], "prepared_dir": next(prepared, None)}
        _run_stage("report", to_flags(settings) + traceback)


def _reproduce_parser() -> argparse.ArgumentParser:
    parser = _recipe_parser(
        "reproduce",
        "Run a recipe for several seeds, each run in a process of its own, and compare its models. What is up to date "
        "is skipped and an interrupted training resumed.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="seeds of everything that is trained")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, which share the processors")
    return parser


def _reproduce(arguments: argparse.Namespace, traceback: list[str]) -> None:
    if arguments.jobs < 1 or min(arguments.seeds) < 0:
        raise UsageError("--jobs must be 1 or more, and no seed negative.")
    path = find_recipe(arguments.recipe)
    recipe = read_recipe(path, STAGES, arguments.set)
    grid = plan_grid(path, recipe, STAGES, arguments.seeds)
    check_paths(path, recipe)
    for what in grid.left_out:
        print(f"left out: {what}", flush=True)
    share_tables(grid.links)
    logs = Path(grid.comparison.writes).parent / "logs"
    failed = execute(grid.runs, arguments.jobs, logs, _run_stage)
    finished = [directory for directory in grid.comparison.settings["evaluation_dirs"] if directory not in failed]
    if finished:
        _run_stage("compare", to_flags(grid.comparison.settings | {"evaluation_dirs": finished}) + traceback)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(grid.runs)} runs did not finish; the logs in '{logs}' say why. Start the command "
            "again when that is put right: it goes on from here."
        )


def _doctor_parser() -> argparse.ArgumentParser:
    parser = _recipe_parser(
        "doctor",
        "Say what is installed, and for a recipe whether it can run and what each stage will take, before anything "
        "starts. Exit status 1 if it cannot run.",
        nargs="?",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and everything else to standard error")
    return parser


def _doctor(arguments: argparse.Namespace, traceback: list[str]) -> None:
    runs, directory = [], Path()
    if arguments.recipe is not None:
        path = find_recipe(arguments.recipe)
        recipe = read_recipe(path, STAGES, arguments.set)
        runs, directory = list(plan(path, recipe, STAGES)), Path(recipe["output_dir"])
        check_paths(path, recipe)
    with redirect_stdout(sys.stderr):
        # Here, not above: help does not wait for torch.
        doctor = importlib.import_module(".doctor", __package__)
        report = doctor.examine(runs, directory)
    print(doctor.page_as_json(report) if arguments.json else doctor.page(report))
    if report.problems:
        sys.exit(ERROR)


def _completion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmesid completion",
        description="Print a script that completes commands, flags, their values and recipes in a shell.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _completion(arguments: argparse.Namespace, traceback: list[str]) -> None:
    # Of the other commands argparse knows the flags.
    flags = {name: list(parser()._option_string_actions) for name, (parser, _) in OTHER_COMMANDS.items()}
    print(completion_script(arguments.shell, STAGES, flags, packaged_recipes()), end="")


# Several words, also when the flag is repeated.
SEVERAL: dict = {"nargs": "+", "action": "extend", "default": []}
OTHER_COMMANDS = {
    "run": (_run_parser, _run),
    "reproduce": (_reproduce_parser, _reproduce),
    "doctor": (_doctor_parser, _doctor),
    "completion": (_completion_parser, _completion),
}


if __name__ == "__main__":
    main()

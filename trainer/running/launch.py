"""The flags of `accelerate launch`, which every stage and `mmesid run` take besides their own: they start the command
in several processes, or on other machines. Without any of them nothing here waits for torch."""

import os
import sys
from collections.abc import Container
from importlib import resources
from pathlib import Path

from .errors import UsageError


CONFIG_FLAG = "--accelerate_config"
# Told apart from all others by the word alone, before accelerate is imported.
COMMAND_MODULE = "mmesid.trainer.cli"


def packaged_configs() -> dict[str, Path]:
    """The configurations of accelerate that are installed with the package, by name."""
    files = sorted(Path(str(file)) for file in resources.files("mmesid.accelerate_configs").iterdir())
    return {file.stem: file for file in files if file.suffix == ".yaml"}


def find_config(name_or_path: str) -> Path:
    """The file of a configuration: one that is installed with the package, by its bare name, or any, by its path;
    raises `FileNotFoundError` if there is neither."""
    path = packaged_configs().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no accelerate configuration '{name_or_path}', neither a file below '{Path.cwd()}' nor one of "
            f"those that come with mmesid: {', '.join(packaged_configs())}; correct the path or the name."
        )
    return path


def split_launch_flags(argv: list[str], own: Container[str]) -> tuple[list[str], list[str]]:
    """
    Parts the flags of a command into those of `accelerate launch` and its own, whose names without dashes are `own`: a
    flag that both know is the command's. `--accelerate_config` is accelerate's `--config_file`, by name or by path.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If a flag of accelerate lacks its value.
    """
    if all(_name(word) in own for word in argv if word.startswith("--")):
        return [], argv
    arguments = _launch_arguments()
    launch: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, separator, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name in own or name not in arguments:
            rest.append(word)
        elif not arguments[name]:
            launch.append(word)
        else:
            value = value if separator else next(words, "--")
            if value.startswith("--"):
                raise UsageError(f"--{name} lacks its value; see `accelerate launch --help`.")
            if f"--{name}" == CONFIG_FLAG:
                name, value = "config_file", str(find_config(value))
            launch += [f"--{name}", value]
    return launch, rest


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


def _launch_arguments() -> dict[str, bool]:
    """Names of the flags of `accelerate launch` and whether they take a value."""
    from accelerate.commands.launch import launch_command_parser

    actions = [action for action in launch_command_parser()._actions if action.dest != "help"]
    known = {name.removeprefix("--"): action.nargs != 0 for action in actions for name in action.option_strings}
    return known | {CONFIG_FLAG.removeprefix("--"): True}


def launch(command: str, launch_flags: list[str], argv: list[str]) -> None:
    """Runs `mmesid <command>` in the processes that the flags of `accelerate launch` ask for, and ends with the exit
    status of the first that fails. Several on the CPU of one machine are started, too, which accelerate leaves to
    MPI."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Nothing in the user's folder is taken for a module.
    os.environ["PYTHONSAFEPATH"] = "1"
    call = [COMMAND_MODULE, command, *argv]
    arguments = launch_command_parser().parse_args(["--quiet", *launch_flags, "--module", *call])
    config = None if arguments.config_file is None else load_config_from_file(arguments.config_file)
    machines = arguments.num_machines or (1 if config is None else config.num_machines)
    on_cpu = arguments.cpu or (config is not None and config.use_cpu)
    processes = arguments.num_processes or (1 if config is None else config.num_processes)
    try:
        if on_cpu and processes > 1 and arguments.mpirun_hostfile is None:
            if machines > 1:
                raise UsageError("--num_machines is above 1, but processes on the CPU share a machine; leave it out.")
            threads = arguments.num_cpu_threads_per_process or max((os.cpu_count() or 1) // processes, 1)
            precision = arguments.mixed_precision or (None if config is None else config.mixed_precision)
            os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision or "no"}
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
            torchrun.main(["--standalone", f"--nproc_per_node={processes}", "--module", *call])
        else:
            launch_command(arguments)
    except ChildFailedError as error:
        # What went wrong is told already, by the process itself.
        sys.exit(error.get_first_failure()[1].exitcode)


def join_processes() -> None:
    """Where [`launch`] has started this process beside others on the CPU: has them know each other before anything
    asks which of them this is."""
    if os.environ.get("ACCELERATE_USE_CPU") == "true" and "LOCAL_RANK" in os.environ:
        from accelerate import PartialState

        PartialState(cpu=True)

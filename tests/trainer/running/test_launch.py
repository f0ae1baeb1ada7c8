"""The flags of `accelerate launch` before a stage: what they start, and the configurations that come along."""

import os
from types import SimpleNamespace

import pytest
import torch.distributed.run
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mmesid.trainer.cli import main
from mmesid.trainer.running.arguments import BestEpochTrainingArguments
from mmesid.trainer.running.launch import packaged_configs, split_launch_flags


KINDS = {
    "cpu": DistributedType.MULTI_CPU,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "single_gpu": DistributedType.NO,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_every_configuration_is_one_of_accelerate():
    configs = {name: load_config_from_file(str(path)) for name, path in packaged_configs().items()}
    assert {name: config.distributed_type for name, config in configs.items()} == KINDS
    # A run's precision is the stage's setting, which its record has.
    assert {config.mixed_precision for config in configs.values()} == {"no"}
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [configs[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")] == [2, 3]
    # The launcher takes every setting of them: one that it does not know would be lost without a word.
    known = vars(accelerate_launch.launch_command_parser().parse_args(["script"]))
    for config in configs.values():
        assert {*config.fsdp_config, *config.deepspeed_config} <= set(known)


def test_flags_of_accelerate_are_told_from_those_of_the_stage():
    own = {"output_dir", "gradient_accumulation_steps", "debug"}
    argv = ["--output_dir", "x", "--gradient_accumulation_steps", "2", "--debug", "a"]
    assert split_launch_flags(argv, own) == ([], argv)
    given = ["--num_processes=2", "--accelerate_config", "fsdp2", "--multi_gpu", "--learning_rat", "1", "word"]
    launch, rest = split_launch_flags([*argv, *given], own)
    config = str(packaged_configs()["fsdp2"])
    assert launch == ["--num_processes", "2", "--config_file", config, "--multi_gpu"]
    # What nobody knows is the stage's to refuse.
    assert rest == [*argv, "--learning_rat", "1", "word"]


@pytest.fixture
def started(monkeypatch):
    """What would have been started: by accelerate, or by torchrun."""
    calls = SimpleNamespace(accelerate=[], torchrun=[])
    for name in ("PYTHONSAFEPATH", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(accelerate_launch, "launch_command", calls.accelerate.append)
    monkeypatch.setattr(torch.distributed.run, "main", calls.torchrun.append)
    return calls


def test_accelerate_starts_the_command_with_the_flags_of_its_own(started):
    main(["finetune", "--output_dir", "out", "--accelerate_config", "zero2", "--num_processes", "4", "--traceback"])
    (arguments,) = started.accelerate
    assert arguments.module and arguments.training_script == "mmesid.trainer.cli"
    assert arguments.training_script_args == ["finetune", "--output_dir", "out", "--traceback"]
    assert arguments.num_processes == 4
    main(["run", "quickstart", "--set", "finetune.seed=1", "--multi_gpu", "--num_processes", "2"])
    assert started.accelerate[1].training_script_args == ["run", "quickstart", "--set", "finetune.seed=1"]


def test_processes_on_the_cpu_are_started_as_well(started):
    main(["evaluate", "--output_dir", "out", "--accelerate_config", "cpu"])
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    main(["evaluate", "--output_dir", "out", "--cpu", "--num_processes", "3", "--mixed_precision", "bf16"])
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for count, call in zip((2, 3), started.torchrun):
        command = ["--module", "mmesid.trainer.cli", "evaluate", "--output_dir", "out"]
        assert call == ["--standalone", f"--nproc_per_node={count}", *command]
    assert not started.accelerate


def test_processes_on_the_cpu_share_one_machine(started, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--output_dir", "out", "--cpu", "--num_processes", "2", "--num_machines", "2"])
    assert ended.value.code == 2 and "--num_machines is above 1" in capsys.readouterr().err
    assert not started.torchrun and not started.accelerate


def test_the_exit_status_is_that_of_the_process_that_failed(started, monkeypatch):
    def fail(argv):
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file="")
        raise ChildFailedError("mmesid", {1: failure})

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--output_dir", "out", "--accelerate_config", "cpu"])
    assert ended.value.code == 2


def test_a_configuration_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sasrec", "--output_dir", "out", "--accelerate_config", "fsdp3"])
    assert ended.value.code == 1
    assert "'fsdp3', neither a file below" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["sasrec", "--num_processes"])
    assert ended.value.code == 2
    assert "--num_processes lacks its value" in capsys.readouterr().err


def test_what_accelerate_was_asked_for_is_a_setting_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = BestEpochTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.bf16 and arguments.changed["bf16"]

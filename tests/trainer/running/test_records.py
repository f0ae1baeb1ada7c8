import dataclasses
import json
import os
import platform
import re
from types import SimpleNamespace

import pytest
import torch

from mmesid.trainer.running import records
from mmesid.trainer.running.arguments import StageArguments, parse
from mmesid.trainer.running.files import to_flags
from mmesid.trainer.running.records import (
    StageRecord,
    StageRun,
    hardware,
    input_digest,
    processor_name,
    write_text_atomic,
)
from mmesid.trainer.stages.sasrec import SASRecArguments
from modeling_mmesid.checkpoints import file_digest


@dataclasses.dataclass(kw_only=True)
class ToyArguments(StageArguments):
    source: str
    size: int = 3


class Toy:
    """A stage that writes its settings and counts how often it ran."""

    def __init__(self, directory):
        self.directory = directory
        self.source = directory / "source.txt"
        self.source.write_text("interactions")
        self.output_dir = directory / "output"
        self.runs = 0

    def stage_run(self, **settings):
        arguments = ToyArguments(output_dir=str(self.output_dir), source=str(self.source), **settings)
        return StageRun("toy", arguments, inputs={"source": arguments.source})

    def __call__(self, files=("result.txt",), **settings):
        run = self.stage_run(**settings)
        if run.is_up_to_date():
            return
        with run as staging:
            self.runs += 1
            for name in files:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_text(f"run {self.runs}")
            run.metrics["validation"] = {"hr@5": 0.5}

    def files(self):
        return {
            path.relative_to(self.output_dir).as_posix(): path.read_text()
            for path in self.output_dir.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def test_a_stage_runs_once(toy, capsys):
    toy()
    assert toy.files().keys() == {"result.txt", "record.json"}
    toy()
    assert toy.runs == 1
    assert "toy: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b'{"stage": "toy"}', b"\xff"])
def test_a_broken_record_is_named_before_the_work_starts(toy, content):
    toy()
    (toy.output_dir / "record.json").write_bytes(content)
    sentence = (
        r"'\S*output/record.json' is no record of a stage \(.+\); remove it and run the stage that wrote '\S*output'"
    )
    for settings in ({}, {"force": True}):
        with pytest.raises(ValueError, match=sentence):
            toy(**settings)
    with pytest.raises(ValueError, match=sentence):
        input_digest(toy.output_dir)
    (toy.output_dir / "record.json").unlink()
    toy()
    assert toy.runs == 2


def test_other_settings_force_and_a_lost_output_run_it_again(toy):
    toy()
    toy(size=4)
    toy(size=4, force=True)
    (toy.output_dir / "result.txt").unlink()
    toy(size=4)
    assert toy.runs == 4
    assert toy.files()["result.txt"] == "run 4"


def test_other_inputs_run_it_again_and_equal_ones_elsewhere_do_not(toy, tmp_path):
    toy()
    moved = tmp_path / "moved.txt"
    moved.write_bytes(toy.source.read_bytes())
    toy.source = moved
    toy()
    assert toy.runs == 1
    moved.write_text("other interactions")
    toy()
    assert toy.runs == 2


def test_a_failure_leaves_earlier_outputs_untouched(toy):
    toy()
    before = toy.files()
    run = toy.stage_run(size=4)
    with pytest.raises(RuntimeError, match="half-way"), run as staging:
        (staging / "result.txt").write_text("half")
        raise RuntimeError("half-way")
    assert toy.files() == before
    assert toy.stage_run().is_up_to_date()


def test_outputs_of_an_earlier_run_that_are_no_longer_written_go(toy):
    (toy.output_dir / "notes.txt").parent.mkdir()
    (toy.output_dir / "notes.txt").write_text("the user's own")
    toy(files=("result.txt", "shards/old.txt"))
    toy(files=("result.txt", "shards/new.txt"), size=4)
    assert toy.files().keys() == {"result.txt", "shards/new.txt", "record.json", "notes.txt"}


def test_the_record_says_what_was_done(toy):
    toy(size=4)
    record = StageRecord.load(toy.output_dir)
    assert record == StageRecord.load(toy.output_dir / "record.json")
    assert record.arguments == {"size": 4}
    assert record.inputs == {"source": file_digest(toy.source)}
    assert record.outputs == {"result.txt": file_digest(toy.output_dir / "result.txt")}
    assert record.metrics == {"validation": {"hr@5": 0.5}}
    assert {"python", "torch", "transformers", "mmesid"} <= record.versions.keys()
    assert record.peak_memory_bytes > 2**20
    assert str(toy.directory) not in json.dumps(dataclasses.asdict(record))


def test_the_hardware_does_not_name_the_machine():
    assert not re.search(rf"\b{re.escape(platform.node())}\b", hardware())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("model name\t: Brand X: 64-Core\n", "Brand X: 64-Core"),
        # As on ARM, and on a virtual machine that hides it.
        ("CPU implementer\t: 0x41\n", None),
        ("model name\t: \n", None),
        (None, None),
    ],
)
def test_the_processor_is_called_by_its_model_or_its_architecture(tmp_path, line, name):
    if line is not None:
        core = "processor\t: {}\nmodel\t\t: 17\n" + line + "cpu MHz\t\t: 2596.128\n\n"
        (tmp_path / "cpuinfo").write_text(core.format(0) + core.format(1))
    assert processor_name(tmp_path / "cpuinfo") == (name or platform.processor() or platform.machine())


@pytest.mark.parametrize(("kind", "name"), [("cuda", "Accelerator Y"), ("mps", "mps")])
def test_accelerators_are_called_by_their_model(monkeypatch, kind, name):
    state = SimpleNamespace(device=torch.device(kind, 0), num_processes=2)
    monkeypatch.setattr(records, "PartialState", lambda: state)
    monkeypatch.setattr(torch.cuda, "get_device_name", {torch.device("cuda", 0): "Accelerator Y"}.get)
    assert hardware() == f"{os.cpu_count()} x {processor_name()}, 2 x {name}"


def test_the_digest_of_a_stage_is_that_of_its_outputs(toy):
    toy()
    before = input_digest(toy.output_dir)
    (toy.output_dir / "checkpoints").mkdir()
    (toy.output_dir / "checkpoints" / "state.bin").write_bytes(b"not an output")
    assert input_digest(toy.output_dir) == before
    toy(size=4)
    assert input_digest(toy.output_dir) != before


def test_the_digest_of_another_directory_is_that_of_all_its_files(tmp_path):
    file = tmp_path / "a" / "b" / "c.txt"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    before = input_digest(tmp_path / "a")
    assert input_digest(tmp_path / "a") == before
    file.rename(tmp_path / "a" / "c.txt")
    assert input_digest(tmp_path / "a") != before


def test_an_input_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing' does not exist; run the stage that writes it first"):
        input_digest(tmp_path / "missing")


def sasrec_arguments(tmp_path, **settings):
    return parse(SASRecArguments, to_flags({"output_dir": tmp_path, "prepared_dir": "prepared"} | settings))


def test_what_changes_nothing_computed_is_not_in_the_fingerprint_nor_in_the_name_of_the_checkpoints(tmp_path):
    def run(**settings):
        return StageRun("sasrec", sasrec_arguments(tmp_path, **settings), inputs={})

    presentation = {"disable_tqdm": True, "logging_steps": 3, "save_total_limit": 4, "per_device_eval_batch_size": 8}
    others = [{"learning_rate": 0.5}, {"seed": 7}, {"hidden_size": 8}, {"num_train_epochs": 9}]
    assert run(**presentation).fingerprint == run().fingerprint
    assert run(**presentation).checkpoints_dir == run().checkpoints_dir
    # The loss of held-out items of a quantizer is that of their batches.
    arguments = [sasrec_arguments(tmp_path, **settings) for settings in ({}, {"per_device_eval_batch_size": 8})]
    assert len({StageRun("quantize", one, inputs={}).fingerprint for one in arguments}) == 2
    runs = [run(), *(run(**settings) for settings in others)]
    assert len({one.fingerprint for one in runs}) == len({one.checkpoints_dir for one in runs}) == 5


def test_recorded_arguments_are_json_values_without_secrets(tmp_path):
    arguments = sasrec_arguments(tmp_path, lr_scheduler_type="cosine", seed=3, hub_token="hf_secret")
    recorded = StageRun("sasrec", arguments, inputs={}).arguments
    assert recorded == {"lr_scheduler_type": "cosine", "seed": 3, "prepared_dir": "prepared"}


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "results.md"
    write_text_atomic(path, "old")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]

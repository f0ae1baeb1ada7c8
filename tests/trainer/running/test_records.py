import dataclasses
import errno
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path
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

from ...processes import run_python, start_python


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


def a_record(**values) -> bytes:
    record = {"stage": "toy", "fingerprint": "", "arguments": {}, "versions": {}, "hardware": "", "seconds": 1}
    return json.dumps(record | {"peak_memory_bytes": 1} | values).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[1, 2]", b'{"stage": "toy"}', b"\xff", b'{"a":' * 3000, b"[" * 100_000, a_record(outputs=["a"]),
        a_record(outputs={"a": 5}), a_record(outputs={"../a": ""}), a_record(seconds="long"), a_record(stage=None),
        a_record(stamps={"a": 5}),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("content", ["", "run 3"], ids=["emptied", "of the same size"])
def test_a_changed_output_is_made_again(toy, capsys, content):
    toy()
    (toy.output_dir / "result.txt").write_text(content)
    toy()
    assert toy.files()["result.txt"] == "run 2"
    assert "result.txt' is not as it was written" in capsys.readouterr().out


def test_a_copy_is_up_to_date_and_an_edited_card_stays(toy, tmp_path):
    toy(files=("result.txt", "README.md"))
    shutil.copytree(toy.output_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    toy.output_dir = tmp_path / "copy"
    (toy.output_dir / "README.md").write_text("edited by hand")
    toy(files=("result.txt", "README.md"))
    assert toy.runs == 1 and toy.files()["README.md"] == "edited by hand"


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


def test_a_failure_leaves_no_empty_directory(toy):
    toy.output_dir = toy.directory / "runs" / "mine" / "output"
    for checkpoint in (None, "checkpoint-1"):
        run = toy.stage_run()
        with pytest.raises(ZeroDivisionError), run:
            (run.checkpoints_dir / (checkpoint or "")).mkdir(parents=True)
            1 / 0  # noqa: B018
        assert run.checkpoints_dir.exists() == bool(checkpoint), "what the next run goes on from stays"
        assert (toy.directory / "runs").exists() == bool(checkpoint)


class Unwritable(Exception):
    """As libraries raise it that are not written in Python."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No room is left on a disk that '.*output' or"),
        (Unwritable("I/O error: No space left on device (os error 28)"), "make room and start the same command again"),
        (
            RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file"),
            "No room is",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8512 vs 8406"), "No room is left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), r"'/x/y' is not open to you \(Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), r"'/x/y' is not open to you \(Read-only file system"),
    ],
)
def test_a_full_disk_or_one_that_cannot_be_written_is_one_sentence(toy, error, sentence):
    toy()
    before = toy.files()
    with pytest.raises(OSError, match=sentence) as raised, toy.stage_run(size=4):
        raise error
    assert "\n" not in str(raised.value) and toy.files() == before


def test_one_run_at_a_time_writes_to_a_directory(toy):
    """The other is refused while the first is at work, and takes over when it was killed."""
    run = toy.stage_run()
    code = """if 1:
        import os, sys, time
        from mmesid.trainer.running.locks import DirectoryLock
        lock = DirectoryLock(sys.argv[1])
        lock.path.parent.mkdir()
        lock.acquire()
        # A worker that outlives it does not hold the lock.
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        print(os.getpid(), flush=True)
        time.sleep(600)
    """
    owner = start_python("-c", code, toy.output_dir / ".lock-record")
    while not (pid := owner._read("stdout").strip()):
        time.sleep(0.01)
    for attempt in (run.is_up_to_date, run.__enter__):
        with pytest.raises(ValueError, match=f"output' is being written by another run, process {pid}; wait until"):
            attempt()
    owner.kill()
    owner.communicate()
    assert (toy.output_dir / ".lock-record").exists()
    toy()
    assert toy.files().keys() == {"result.txt", "record.json"}


# The stage of `Toy`, killed at each change of a file while it replaces other outputs.
KILLED_EVERYWHERE = """if 1:
    import shutil, signal, sys
    from pathlib import Path
    sys.path.append(sys.argv[2])
    from tests.faults import forked, kill_at
    from tests.trainer.running.test_records import Toy

    root = Path(sys.argv[1])
    def stage(*files, **settings):
        Toy(root / "work")(files, **settings)
    def work():
        stage("result.txt", "shards/new.txt", "last.txt", size=4)
    def contents():
        return {path.relative_to(root / "work").as_posix(): path.read_bytes()[:5]
                for path in (root / "work").rglob("*") if path.is_file()}
    def run(point=None):
        status = forked(work, root / "log", lambda: kill_at(point, str(root)))
        assert status == 0 or point, (root / "log").read_text()
        return status

    (root / "work").mkdir()
    assert forked(lambda: stage("result.txt", "shards/old.txt"), root / "log") == 0
    shutil.copytree(root / "work", root / "earlier")
    run()
    expected, point, status = contents(), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        point += 1
        shutil.rmtree(root / "work")
        shutil.copytree(root / "earlier", root / "work")
        status = run(point)
        run()
        assert contents() == expected, (point, contents())
    assert status == 0, (root / "log").read_text()
    print(point)
"""


def test_a_run_that_was_killed_anywhere_ends_as_an_undisturbed_one(tmp_path):
    finished = run_python("-c", KILLED_EVERYWHERE, tmp_path, Path(__file__).parents[3])
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.split()[-1]) > 20


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
    changed = input_digest(toy.output_dir)
    assert changed != before
    (toy.output_dir / "result.txt").write_text("edited by hand")
    assert input_digest(toy.output_dir) != changed
    (toy.output_dir / "result.txt").unlink()
    with pytest.raises(FileNotFoundError, match="result.txt' does not exist; run the stage that writes it first"):
        input_digest(toy.output_dir)


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

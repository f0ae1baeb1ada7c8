"""The record a stage leaves beside its outputs: what makes a rerun skip, a resume safe and a model card honest."""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_mmesid.checkpoints import COMPANIONS_NAME, file_digest, require_inside

from .files import read_json, told_of_a_full_disk, write_text_atomic
from .locks import DirectoryLock


RECORD_NAME = "record.json"
RESULTS_NAME = "eval_results.json"
TRAINING_LOG_NAME = "training_log.json"
# Files of trackers, which name times, machines and paths: they stay here.
LOGS_DIR = "logs"
# What presents a stage's outputs: it tells times and machines, and later measurements change it.
_PRESENTING_FILES = ("README.md", RESULTS_NAME, TRAINING_LOG_NAME, COMPANIONS_NAME)

CPUINFO = "/proc/cpuinfo"
RECORDED_PACKAGES = ("mmesid", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "evaluate")

# Arguments that change where a stage writes or what it prints, never what it computes; and two of TrainingArguments
# that the parser hands over in another type than their default has.
_PRESENTATION_ARGUMENTS = {
    "output_dir", "force", "json", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "dataloader_num_workers",
    "per_device_eval_batch_size", "save_total_limit", "local_rank", "use_cpu", "project", "trackio_space_id",
    "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision", "hub_links",
    "hub_always_push", "debug", "include_num_input_tokens_seen",
}  # fmt: skip
# Their evaluation loss compares the items of a batch with each other.
_STAGES_THAT_COMPARE_WITHIN_BATCHES = ("quantize", "encoder")


def installed_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in RECORDED_PACKAGES}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; the stages of one `mmesid run` share a process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware() -> str:
    """Processor, and the accelerators or, on the processor alone, the processes if there are several."""
    device, count = PartialState().device, PartialState().num_processes
    processor = f"{os.cpu_count()} x {processor_name()}"
    if device.type == "cpu":
        return processor if count == 1 else f"{processor}, {count} processes"
    return f"{processor}, {count} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"


def processor_name(cpuinfo: str | os.PathLike = CPUINFO) -> str:
    """The processor's model as Linux writes it to the file `cpuinfo`, or its architecture where that is not told."""
    text = Path(cpuinfo).read_text(encoding="utf-8") if Path(cpuinfo).is_file() else ""
    model = re.search(r"^model name\s*:[ \t]*(\S.*)", text, flags=re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


@dataclass(kw_only=True)
class StageRecord:
    """What a stage did, of what, and on what machine."""

    stage: str
    # Digest of the stage's name, changed arguments and inputs: equal fingerprints mean equal work.
    fingerprint: str
    # Those that differ from their defaults.
    arguments: dict
    # SHA-256 of every input by argument name, and of every file written by path relative to the output directory.
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    # Size in bytes and time of the last change in nanoseconds of these files.
    stamps: dict[str, list] = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    # What a model card says besides: all settings, data statistics, encoder, number of parameters ...
    details: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    hardware: str = field(default_factory=hardware)
    seconds: float
    peak_memory_bytes: int = field(default_factory=peak_memory_bytes)
    finished_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "StageRecord":
        """Reads a record from a file, or from the `record.json` of a directory; raises `ValueError` if it is none."""
        path = Path(path)
        if path.is_dir():
            path = path / RECORD_NAME
        try:
            record = cls(**read_json(path))
            record._check(path)
        # TypeError: JSON, but not these fields.
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"'{path}' is no record of a stage ({error}); remove it and run the stage that wrote '{path.parent}' "
                "again."
            ) from error
        return record

    def _check(self, path: Path) -> None:
        """Raises `ValueError` where a field has another type than a record's, or an output lies elsewhere."""
        for one in fields(self):
            wanted: typing.Any = (int, float) if one.type is float else typing.get_origin(one.type) or one.type
            if not isinstance(getattr(self, one.name), wanted):
                raise ValueError(f"its {one.name} is {getattr(self, one.name)!r:.100}")
        texts = [self.inputs, self.outputs, self.versions]
        if not all(isinstance(value, str) for one in texts for value in one.values()):
            raise ValueError("its inputs, outputs and versions are not texts")
        if not all(isinstance(stamp, list) and len(stamp) == 2 for stamp in self.stamps.values()):
            raise ValueError("its stamps are not pairs of numbers")
        require_inside(path, self.outputs)

    def stamp(self, directory: Path) -> None:
        """Notes size and time of the outputs, which lie in the directory."""
        stats = {name: (directory / name).stat() for name in self.outputs}
        self.stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def is_as_written(self, directory: Path, name: str) -> bool:
        """
        Whether an output in the directory is what the stage wrote, by its size and time. One of another time, as
        copies have, is read and compared by its digest. What presents the others may be edited, but not be gone.
        """
        path = directory / name
        if not path.is_file() or name in _PRESENTING_FILES:
            return path.is_file()
        stat, stamp = path.stat(), self.stamps.get(name)
        if stamp == [stat.st_size, stat.st_mtime_ns]:
            return True
        return (not stamp or stamp[0] == stat.st_size) and file_digest(path) == self.outputs[name]


def json_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_json(value) -> str:
    """A value as the text of a JSON file, which knows neither NaN nor infinity: they become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(plain, indent=2) + "\n"


def require_exists(path: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` if there is neither a file nor a directory."""
    if not Path(path).exists():
        where = "" if Path(path).is_absolute() else f" below '{Path.cwd()}'"
        raise FileNotFoundError(
            f"'{path}' does not exist{where}; run the stage that writes it first, or correct the path."
        )


def input_digest(path: str | os.PathLike | list) -> str:
    """SHA-256 of an input: a file counts by its bytes, a directory that a stage wrote by its recorded outputs as long
    as they are as they were written, any other directory by all its files, and a list by the digests of its
    members."""
    if isinstance(path, list):
        return json_digest([input_digest(one) for one in path])
    require_exists(path)
    path = Path(path)
    if path.is_file():
        return file_digests([path], path.name)[0]
    if (path / journal_name(RECORD_NAME)).is_file():
        raise ValueError(
            f"The stage that writes '{path}' was stopped while it put its outputs in place, or is about it; start it "
            "again, which completes them."
        )
    if (path / RECORD_NAME).is_file():
        record = StageRecord.load(path)
        digests = {name: digest for name, digest in record.outputs.items() if not _presents(name)}
        for name in digests:
            require_exists(path / name)
            if not record.is_as_written(path, name):
                digests[name] = file_digest(path / name)
        return json_digest(digests)
    return json_digest(digests_below(path, path.name))


def _presents(name: str) -> bool:
    return name in _PRESENTING_FILES or name.startswith((f"{LOGS_DIR}/", "figures/", ".eval_results/"))


def digests_below(directory: Path, name: str) -> dict[str, str]:
    """SHA-256 of every file in a directory, by its path there."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return dict(zip((file.relative_to(directory).as_posix() for file in files), file_digests(files, name)))


def file_digests(files: list[Path], name: str) -> list[str]:
    """SHA-256 of every file, with a bar of this name: raw data are gigabytes, and pictures many files."""
    total = sum(file.stat().st_size for file in files)
    hidden = not PartialState().is_local_main_process
    digests = [hashlib.sha256() for _ in files]
    with tqdm(total=total, desc=f"hashing {name}", unit="B", unit_scale=True, delay=2, disable=hidden) as progress:
        for path, digest in zip(files, digests):
            with open(path, "rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
                    progress.update(len(block))
    return [digest.hexdigest() for digest in digests]


def journal_name(record_name: str) -> str:
    """The file that says which outputs of a stage are being put in place."""
    return f".publishing-{record_name}"


def lock_name(record_name: str) -> str:
    """The file by which one run at a time writes a record and what it records."""
    return f".lock-{Path(record_name).stem}"


class StageRun:
    """
    One execution of a stage: knows whether its outputs are up to date, collects new ones in a staging directory, and
    puts them in place together with the record only if the stage succeeds, so that a failure leaves earlier outputs
    untouched.

    ```python
    run = StageRun("sasrec", arguments, inputs={"prepared_dir": arguments.prepared_dir})
    if run.is_up_to_date():
        return
    with run as staging:  # a pathlib.Path; only the main process may write to it
        model.save_pretrained(staging)
        run.metrics.update(metrics)
    ```

    Inputs are the files and directories that the stage reads, by the argument that they come from (a list where it
    reads only some files of a directory). Stages that share a directory differ in `record_name`.

    One run at a time writes to a directory; another is refused with a `ValueError`. A run that was killed leaves
    nothing that the next one does not complete or remove: until all outputs are staged the earlier ones stay, and from
    then on a journal says what is left to be done.
    """

    def __init__(
        self, stage: str, arguments, inputs: Mapping[str, str | os.PathLike | list], record_name: str = RECORD_NAME
    ):
        self.stage = stage
        self.output_dir = Path(arguments.output_dir)
        self.force = arguments.force
        self.record_path = self.output_dir / record_name
        self.inputs = {name: input_digest(paths) for name, paths in inputs.items()}
        self.arguments = {
            name: value
            for name, value in arguments.changed.items()
            if name not in self._presentation and name not in inputs
        }
        self.fingerprint = json_digest([stage, self.arguments, self.inputs])
        self.metrics: dict = {}
        # With the others, for those who want to repeat the run when defaults have changed.
        settings = without_presentation(arguments.settings)
        self.details: dict = {"settings": {name: value for name, value in settings.items() if name not in inputs}}
        self.staging = self.output_dir / f".staging-{self.record_path.stem}-{self.fingerprint[:16]}"
        self._journal = self.output_dir / journal_name(record_name)
        self._lock = DirectoryLock(self.output_dir / lock_name(record_name))

    @property
    def _presentation(self) -> set[str]:
        if self.stage in _STAGES_THAT_COMPARE_WITHIN_BATCHES:
            return _PRESENTATION_ARGUMENTS - {"per_device_eval_batch_size"}
        return _PRESENTATION_ARGUMENTS

    @property
    def checkpoints_dir(self) -> Path:
        """Where a Trainer keeps its checkpoints until the stage succeeds; never those of other settings or inputs."""
        return self.output_dir / "checkpoints" / f"{self.record_path.stem}-{self.fingerprint[:16]}"

    def is_up_to_date(self) -> bool:
        """Whether an equal run has already written outputs that are still there as they were; says so when it has, and
        which is not when one was changed. Completes first what a killed run had begun to put in place, and removes
        what it left half-written."""
        if PartialState().is_main_process and (left := self._left_behind()):
            with self._lock:
                if self._journal in left:
                    self._complete()
                    print(f"{self.stage}: completed what a killed run had begun to put into '{self.output_dir}'")
                self._clear()
        PartialState().wait_for_everyone()
        current = self._is_current()
        PartialState().wait_for_everyone()
        if current and PartialState().is_main_process:
            print(
                f"{self.stage}: '{self.record_path}' is up to date, skipped (--force true runs it again)", flush=True
            )
        return current

    def _is_current(self) -> bool:
        if not self.record_path.is_file():
            return False
        # With `force` too: a record that cannot be read would only be found out when the work is done.
        record = StageRecord.load(self.record_path)
        if record.fingerprint != self.fingerprint or self.force:
            return False
        for name in record.outputs:
            if not record.is_as_written(self.output_dir, name):
                if PartialState().is_main_process:
                    print(
                        f"{self.stage}: '{self.output_dir / name}' is not as it was written, so the stage runs again"
                    )
                return False
        return True

    def _left_behind(self) -> list[Path]:
        """What a killed run of the stage left in the directory, besides checkpoints, or one at work has there."""
        stem = self.record_path.stem
        names = (
            self._journal.name,
            f".*{self.record_path.name}.partial",
            f".lock-{stem}",
            f".staging-{stem}-" + 16 * "?",
        )
        return [path for name in names for path in self.output_dir.glob(name)]

    def _clear(self) -> None:
        for path in self._left_behind():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self._lock.path:
                path.unlink()

    def __enter__(self) -> Path:
        self._start = time.perf_counter()
        if PartialState().is_main_process:
            self._made = [path for path in (self.output_dir, *self.output_dir.parents) if not path.exists()]
            with told_of_a_full_disk(self.output_dir):
                self.output_dir.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                self._clear()
                self.staging.mkdir()
        PartialState().wait_for_everyone()
        return self.staging

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception is None:
            PartialState().wait_for_everyone()
        if not PartialState().is_main_process:
            if exception is None:
                # For the main one to put the outputs in place.
                PartialState().wait_for_everyone()
            return
        try:
            with told_of_a_full_disk(self.output_dir):
                if exception is not None:
                    raise exception
                self._publish()
        except BaseException:
            self._abandon()
            raise
        self._lock.release()
        PartialState().wait_for_everyone()

    def _abandon(self) -> None:
        """Removes what the run has made, up to its checkpoints and to what the next run is to complete."""
        if not self._journal.is_file():
            shutil.rmtree(self.staging, ignore_errors=True)
        self._lock.release()
        for directory in (self.checkpoints_dir, self.checkpoints_dir.parent, *self._made):
            with contextlib.suppress(OSError):  # Not there, or not empty.
                directory.rmdir()

    def draft_record(self) -> StageRecord:
        """The record as it stands, for a card that is written inside the stage."""
        return StageRecord(
            stage=self.stage,
            fingerprint=self.fingerprint,
            arguments=self.arguments,
            inputs=self.inputs,
            outputs=digests_below(self.staging, f"outputs of {self.stage}"),
            metrics=self.metrics,
            details=self.details,
            seconds=round(time.perf_counter() - self._start, 1),
        )

    def _publish(self) -> None:
        record = self.draft_record()
        record.stamp(self.staging)
        outdated = set()
        if self.record_path.is_file():
            outdated = set(StageRecord.load(self.record_path).outputs) - set(record.outputs)
        journal = {"staging": self.staging.name, "outdated": sorted(outdated), "record": asdict(record)}
        # From here on the run is no longer undone but completed, by the next one if need be.
        write_text_atomic(self._journal, to_json(journal))
        self._complete()
        # The tables of all modalities share a directory.
        part = "" if self.record_path.name == RECORD_NAME else f" {self.record_path.stem}"
        print(f"{self.stage}{part}: wrote '{self.output_dir}' in {record.seconds:.1f} s", flush=True)

    def _complete(self) -> None:
        """Does what the journal says, whatever part of it was done already."""
        journal = read_json(self._journal)
        require_inside(self._journal, [journal["staging"], *journal["outdated"], *journal["record"]["outputs"]])
        # Without a record nothing counts as up to date.
        self.record_path.unlink(missing_ok=True)
        for name in journal["outdated"]:
            path = self.output_dir / name
            path.unlink(missing_ok=True)
            for parent in path.parents[: len(Path(name).parts) - 1]:
                with contextlib.suppress(OSError):  # Not there, or not empty.
                    parent.rmdir()
        staging = self.output_dir / journal["staging"]
        for name in journal["record"]["outputs"]:
            if (staging / name).is_file():
                (self.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, self.output_dir / name)
        shutil.rmtree(staging, ignore_errors=True)
        # Also those of earlier settings; not those of a stage that shares the directory.
        for checkpoints in self.checkpoints_dir.parent.glob(f"{self.record_path.stem}-*"):
            shutil.rmtree(checkpoints)
        with contextlib.suppress(OSError):  # Not there, or not empty: a stage that shares the directory is at work.
            self.checkpoints_dir.parent.rmdir()
        write_text_atomic(self.record_path, to_json(journal["record"]))
        self._journal.unlink()


def without_presentation(settings: dict) -> dict:
    """The settings without those that change where a stage writes or what it prints."""
    return {name: value for name, value in settings.items() if name not in _PRESENTATION_ARGUMENTS}


def unstaged_record(stage: str, arguments: dict, seconds: float) -> StageRecord:
    """The record of work that a stage could have done, for the card of a Trainer that is used by itself: of its
    changed arguments, plain values are recorded."""
    plain = {
        name: value
        for name, value in arguments.items()
        if name not in _PRESENTATION_ARGUMENTS and isinstance(value, (str, int, float, list))
    }
    return StageRecord(stage=stage, fingerprint=json_digest([stage, plain]), arguments=plain, seconds=seconds)

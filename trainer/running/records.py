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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_mmesid.checkpoints import COMPANIONS_NAME


RECORD_NAME = "record.json"
RESULTS_NAME = "eval_results.json"
# What presents a stage's outputs: it tells times and machines, and later measurements change it.
_PRESENTING_FILES = ("README.md", RESULTS_NAME, COMPANIONS_NAME)

CPUINFO = "/proc/cpuinfo"
RECORDED_PACKAGES = ("mmesid", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "evaluate")

# Arguments that change where a stage writes or what it prints, never what it computes; and two of TrainingArguments
# that the parser hands over in another type than their default has.
_PRESENTATION_ARGUMENTS = {
    "output_dir", "force", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_steps",
    "logging_strategy", "logging_first_step", "report_to", "run_name", "dataloader_num_workers",
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
    metrics: dict = field(default_factory=dict)
    # What a model card says besides: data statistics, encoder, number of parameters ...
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
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        # TypeError: JSON, but not these fields.
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"'{path}' is no record of a stage ({error}); remove it and run the stage that wrote '{path.parent}' "
                "again."
            ) from error


def json_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_exists(path: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` if there is neither a file nor a directory."""
    if not Path(path).exists():
        where = "" if Path(path).is_absolute() else f" below '{Path.cwd()}'"
        raise FileNotFoundError(
            f"'{path}' does not exist{where}; run the stage that writes it first, or correct the path."
        )


def input_digest(path: str | os.PathLike | list) -> str:
    """SHA-256 of an input: a file counts by its bytes, a directory that a stage wrote by its recorded outputs, any
    other directory by all its files, and a list by the digests of its members."""
    if isinstance(path, list):
        return json_digest([input_digest(one) for one in path])
    require_exists(path)
    path = Path(path)
    if path.is_file():
        return file_digests([path], path.name)[0]
    if (path / RECORD_NAME).is_file():
        outputs = StageRecord.load(path).outputs
        return json_digest({name: digest for name, digest in outputs.items() if name not in _PRESENTING_FILES})
    return json_digest(digests_below(path, path.name))


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
        self.details: dict = {}
        self.staging = self.output_dir / f".staging-{self.fingerprint[:16]}"

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
        """Whether an equal run has already written outputs that are still there; says so when it has."""
        current = False
        if self.record_path.is_file():
            # With `force` too: a record that cannot be read would only be found out when the work is done.
            record = StageRecord.load(self.record_path)
            present = all((self.output_dir / name).is_file() for name in record.outputs)
            current = present and record.fingerprint == self.fingerprint and not self.force
        PartialState().wait_for_everyone()
        if current and PartialState().is_main_process:
            print(
                f"{self.stage}: '{self.record_path}' is up to date, skipped (--force true runs it again)", flush=True
            )
        return current

    def __enter__(self) -> Path:
        self._start = time.perf_counter()
        if PartialState().is_main_process:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
        PartialState().wait_for_everyone()
        return self.staging

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
            return
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            self._publish()
        PartialState().wait_for_everyone()

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
        outdated = set()
        if self.record_path.is_file():
            outdated = set(StageRecord.load(self.record_path).outputs) - set(record.outputs)
            # Without a record nothing counts as up to date: a crash between two moves is repaired by the next run.
            self.record_path.unlink()
        for name in record.outputs:
            target = self.output_dir / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.staging / name, target)
        for name in outdated:
            (self.output_dir / name).unlink(missing_ok=True)
        shutil.rmtree(self.staging)
        # Also those of earlier settings; not those of a stage that shares the directory.
        for checkpoints in self.checkpoints_dir.parent.glob(f"{self.record_path.stem}-*"):
            shutil.rmtree(checkpoints)
        with contextlib.suppress(OSError):  # Not there, or not empty: a stage that shares the directory is at work.
            self.checkpoints_dir.parent.rmdir()
        write_text_atomic(self.record_path, json.dumps(asdict(record), indent=2) + "\n")
        print(f"{self.stage}: wrote '{self.output_dir}' in {record.seconds:.1f} s", flush=True)


def unstaged_record(stage: str, arguments: dict, seconds: float) -> StageRecord:
    """The record of work that a stage could have done, for the card of a Trainer that is used by itself: of its
    changed arguments, plain values are recorded."""
    plain = {
        name: value
        for name, value in arguments.items()
        if name not in _PRESENTATION_ARGUMENTS and isinstance(value, (str, int, float, list))
    }
    return StageRecord(stage=stage, fingerprint=json_digest([stage, plain]), arguments=plain, seconds=seconds)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""
`make faults`: what befalls the stages of a small run, one after the other, and what the next run makes of it.

Each stage is killed before each change of a file (or every `--step`-th) and at `--random` random times, meets a full
disk and outputs that cannot be written, runs twice at once, and is killed while the clock and the files' times are
moved. After each the same command is started again, and the directory must be that of an undisturbed run but for
times; a run that refuses must do so in one sentence, and work once what it names is put right.

    python tests/harness/faults.py --stages sasrec embed --step 10 --random 5

It prints one line per stage and trial, and ends with status 1 if any directory differed.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2]))

from tests.faults import forked, kill_at, status_of  # noqa: E402


SMALL = "--num_train_epochs 2 --per_device_train_batch_size 64 --disable_tqdm true --use_cpu true".split()
PREPARED = ["--prepared_dir", "run/prepared"]
COMMANDS = {
    "prepare": "--source synthetic --num_items 60 --num_users 80 --output_dir run/prepared".split(),
    "sasrec": [*PREPARED, *"--output_dir run/sasrec --hidden_size 8".split(), *SMALL],
    "embed": [
        *PREPARED, *"--output_dir run/embeddings --modality collaborative --model_name_or_path run/sasrec".split(),
        *"--use_cpu true".split(),
    ],
    "quantize": [
        *PREPARED, *"--embeddings_dir run/embeddings --output_dir run/quantizer --modalities collaborative".split(),
        *"--num_quantizers 2 --codebook_size 4 --codebook_dim 8 --encoder_hidden_dims 8".split(), *SMALL,
    ],
    "finetune": [
        *PREPARED, *"--embeddings_dir run/embeddings --quantizer_dir run/quantizer --hidden_size 8".split(),
        *"--num_hidden_layers 1 --output_dir run/recommender".split(), *SMALL,
    ],
    "evaluate": [
        *PREPARED, *"--output_dir run/evaluation --model_dirs run/sasrec run/recommender --use_cpu true".split(),
        *"--bootstrap_resamples 10".split(),
    ],
}  # fmt: skip
# Recorded values that differ between two runs of the same work, and files that show them.
TIMES = {"seconds", "finished_at", "peak_memory_bytes", "stamps"}
SHOWN = re.compile(r"\d[\d.,:T+-]*( ?(s|min|h|ms|GiB|MiB|MB|GB|seconds|minutes|UTC)\b)?")
SENTENCE = re.compile(r"mmesid \w+: error: [^\n]+\n?$")


class Harness:
    def __init__(self, root: Path, seed: int):
        self.root = root
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def start(self, stage: str, work: Path, before=None, wait: bool = True, log: str = "log", flags=()) -> int:
        def run() -> None:
            os.chdir(work)
            importlib.import_module("mmesid.trainer.cli").main([stage, *COMMANDS[stage], *flags])

        return forked(run, self.root / log, before, wait)

    def said(self, log: str = "log") -> str:
        lines = (self.root / log).read_text(errors="replace").splitlines(keepends=True)
        return lines[-1] if lines else ""

    def check(self, stage: str, what: str, work: Path, expected: dict) -> bool:
        """Starts the stage again, to its end, and compares."""
        self.counts[f"{stage} {what.split(' ')[0]}"] += 1
        status = self.start(stage, work)
        if status != 0:
            return self.fault(stage, what, f"the next run ended with {status}: {self.said()}", work)
        found = contents(work)
        differing = sorted({*found} ^ {*expected} | {name for name in found if found[name] != expected.get(name)})
        return not differing or self.fault(stage, what, f"differs in {differing[:4]}", work)

    def require_sentence(
        self, stage: str, what: str, status: int, work: Path, log: str = "log", may_succeed: bool = True
    ) -> None:
        """A run that was disturbed either succeeds or ends in one sentence."""
        refused = status in (1, 2) and SENTENCE.search(self.said(log))
        if not (refused or (may_succeed and status == 0)):
            self.fault(stage, what, f"ended with {status}: {self.said(log)}", work)

    def fault(self, stage: str, what: str, how: str, work: Path) -> bool:
        self.faults.append(f"{stage}, {what}: {how.strip()}")
        print("FAULT", self.faults[-1], flush=True)
        if not (self.root / "kept").exists():
            shutil.copytree(work, self.root / "kept")
        return False


def contents(work: Path) -> dict[str, object]:
    """Every file below a directory by its path, without what tells times."""
    return {path.relative_to(work).as_posix(): _content(path) for path in sorted(work.rglob("*")) if not path.is_dir()}


def _content(path: Path) -> object:
    if path.suffix in (".md", ".html"):
        return SHOWN.sub("N", path.read_text(encoding="utf-8"))
    if path.suffix != ".json":
        return path.read_bytes()
    return _timeless(json.loads(path.read_text(encoding="utf-8")))


def _timeless(value):
    if isinstance(value, dict):
        kept = {key: member for key, member in value.items() if key not in TIMES and not re.search("time|second", key)}
        if "fingerprint" in kept:
            # The digests of the files that show times.
            kept["outputs"] = {
                name: digest
                for name, digest in kept["outputs"].items()
                if not name.endswith((".md", ".html", ".json"))
            }
        return {key: _timeless(member) for key, member in kept.items()}
    return [_timeless(member) for member in value] if isinstance(value, list) else value


def fresh(snapshot: Path, work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(snapshot, work)
    return work


def killed_everywhere(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    point, status = 1, -signal.SIGKILL
    while status == -signal.SIGKILL:
        fresh(snapshot, work)
        status = harness.start(stage, work, partial(kill_at, point, str(work)))
        if status == -signal.SIGKILL:
            harness.check(stage, f"killed before change {point}", work, expected)
        point += arguments.step


def killed_at_random(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    begin = time.monotonic()
    harness.start(stage, fresh(snapshot, work))
    lasts = time.monotonic() - begin
    for _ in range(arguments.random):
        fresh(snapshot, work)
        seconds = harness.random.uniform(0, lasts)
        status_of(harness.start(stage, work, wait=False), seconds)
        harness.check(stage, f"killed-at-random after {seconds:.2f} s", work, expected)


def full_files(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    """As on a full disk: no file may grow beyond a limit, which the file that holds the output bounds from below."""
    for limit in (5_000, 20_000, 50_000):
        fresh(snapshot, work)
        status = harness.start(stage, work, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
        harness.require_sentence(stage, f"files of {limit} bytes", status, work)
        harness.check(stage, f"full-files of {limit} bytes", work, expected)


def full_disk(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    """A disk of its own, of a few more KiB than the snapshot, and then a larger one; skipped where mounting is not
    allowed."""
    held = sum(path.stat().st_size + 4096 for path in snapshot.rglob("*"))
    for size in (0, 20_000, 100_000, 300_000):
        mount = harness.root / "mount"
        mount.mkdir(exist_ok=True)
        if os.system(f"mount -t tmpfs -o size={held + size or 4096} tmpfs '{mount}' 2>/dev/null"):
            print(f"{stage}: mounting is not allowed here, so no small disk was filled")
            return
        try:
            work = fresh(snapshot, mount / "work")
            status = harness.start(stage, work)
            harness.require_sentence(stage, f"disk with {size} bytes of room", status, work)
            os.system(f"mount -o remount,size=1G '{mount}'")
            harness.check(stage, f"full-disk with {size} bytes of room, then more", work, expected)
        finally:
            os.system(f"umount '{mount}'")


def read_only(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    """The directory of the outputs belongs to another user and may only be read."""
    fresh(snapshot, work)
    output = work / COMMANDS[stage][COMMANDS[stage].index("--output_dir") + 1]
    output.mkdir(parents=True, exist_ok=True)
    nobody = 65534
    for path in [work, *work.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)

    def unprivileged() -> None:
        os.environ |= {"HOME": str(harness.root / "home"), "HF_HOME": str(harness.root / "home")}
        if os.getuid() == 0:
            os.setgid(nobody)
            os.setuid(nobody)
        else:
            os.chmod(output, 0o555)

    status = harness.start(stage, work, unprivileged)
    harness.require_sentence(stage, "read only", status, work, may_succeed=False)
    os.chmod(output, 0o755)
    harness.check(stage, "read-only, then writable", work, expected)


def two_at_once(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    for pause in (0.0, 0.05, 0.3):
        fresh(snapshot, work)
        first = harness.start(stage, work, wait=False, log="first")
        time.sleep(pause)
        second = harness.start(stage, work, wait=False, log="second")
        for log, status in (("first", status_of(first)), ("second", status_of(second))):
            harness.require_sentence(stage, "two at once", status, work, log)
        harness.check(stage, f"two-at-once {pause} s apart", work, expected)


def moved_clock(harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments) -> None:
    """Killed halfway; all files then carry times in the past or the future, and the clock stands years before."""
    for shift in (-400 * 86400.0, 400 * 86400.0):
        fresh(snapshot, work)
        harness.start(stage, work, lambda: kill_at(12, str(work)))
        for path in work.rglob("*"):
            at = time.time() + harness.random.uniform(-1, 1) * abs(shift)
            os.utime(path, (at, at))

        def moved(shift=shift, real=time.time) -> None:
            time.time = lambda: real() + shift

        status = harness.start(stage, work, moved)
        if status != 0:
            harness.fault(stage, "moved clock", f"ended with {status}: {harness.said()}", work)
        harness.check(stage, f"moved-clock by {shift / 86400:.0f} days", work, expected)
        if "is up to date" not in (harness.root / "log").read_text():
            harness.fault(stage, "moved clock", "an unchanged run is made again", work)


TRIALS = {
    "killed": killed_everywhere,
    "random": killed_at_random,
    "files": full_files,
    "disk": full_disk,
    "read_only": read_only,
    "two": two_at_once,
    "clock": moved_clock,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--step", type=int, default=1, help="kill at every n-th change of a file")
    parser.add_argument("--random", type=int, default=50, help="kills at random times per stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    arguments = parser.parse_args(argv)

    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # What every stage imports, before the first fork; nothing of it starts a thread.
    for stage in COMMANDS:
        importlib.import_module(f"mmesid.trainer.stages.{stage}")
    for module in (
        "accelerate", "datasets", "matplotlib.pyplot", "peft", "transformers.models.llama.modeling_llama",
        "mmesid.trainer.data.sources.synthetic", "mmesid.trainer.encoders.sasrec",
    ):  # fmt: skip
        importlib.import_module(module)

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        os.environ |= {"HF_HOME": str(root / "home"), "HF_DATASETS_CACHE": str(root / "home" / "datasets")}
        harness = Harness(root, arguments.seed)
        work, snapshot = root / "work", root / "snapshot"
        (root / "undisturbed").mkdir()
        begin, remaining = time.monotonic(), {*arguments.stages}
        for stage in COMMANDS:
            if not remaining:
                break
            shutil.rmtree(snapshot, ignore_errors=True)
            shutil.copytree(root / "undisturbed", snapshot)
            if harness.start(stage, root / "undisturbed") != 0:
                print(harness.said(), file=sys.stderr)
                return 1
            if stage not in arguments.stages:
                continue
            remaining = remaining - {stage}
            expected = contents(root / "undisturbed")
            for name in arguments.trials:
                TRIALS[name](harness, stage, snapshot, work, expected, arguments)
            done = {name.split()[1]: count for name, count in harness.counts.items() if name.split()[0] == stage}
            print(f"{stage}: {done}, {len(harness.faults)} faults, {time.monotonic() - begin:.0f} s", flush=True)
        print(f"{sum(harness.counts.values())} trials, {len(harness.faults)} faults")
        for fault in harness.faults:
            print(fault)
        return 1 if harness.faults else 0


if __name__ == "__main__":
    sys.exit(main())

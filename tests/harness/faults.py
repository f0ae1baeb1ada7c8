"""
`make faults`: what befalls the stages of a small run, one after the other, and what the next run makes of it.

Each stage meets what a kill leaves before each of its changes of a file (or every `--step`-th), in an empty directory
and in one with outputs of other settings; it is killed at `--random` random times, meets a full disk and outputs that
cannot be written, runs twice at once, and is killed while the clock and the files' times are moved. After each the
same command is started again, and the directory must be that of an undisturbed run but for times; a run that refuses
must do so in one sentence, and work once what it names is put right.

    python tests/harness/faults.py --stages sasrec embed --step 10 --random 5

It prints one line per stage and trial, and ends with status 1 if any directory differed.
"""

import argparse
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np


sys.path.append(str(Path(__file__).parents[2]))

from tests.faults import forked, keep_states, kill_at, status_of  # noqa: E402


SMALL = "--num_train_epochs 2 --per_device_train_batch_size 64 --disable_tqdm true --use_cpu true".split()
PREPARED = ["--prepared_dir", "run/prepared"]
# By a name: the stage and its flags.
COMMANDS = {
    "prepare": "prepare --source synthetic --num_items 60 --num_users 80 --output_dir run/prepared".split(),
    "sasrec": ["sasrec", *PREPARED, *"--output_dir run/sasrec --hidden_size 8".split(), *SMALL],
    "encoder": [
        "encoder", *PREPARED, *"--output_dir run/encoder --hidden_size 32 --image_size 32".split(),
        *"--max_text_length 8".split(), *SMALL,
    ],
    "embed": [
        "embed", *PREPARED, *"--output_dir run/embeddings --modality collaborative".split(),
        *"--model_name_or_path run/sasrec --use_cpu true".split(),
    ],
    # Beside the tables of another modality.
    "embed_text": [
        "embed", *PREPARED, *"--output_dir run/embeddings --modality text --encoder dual_encoder".split(),
        *"--model_name_or_path run/encoder --use_cpu true".split(),
    ],
    "quantize": [
        "quantize", *PREPARED, *"--embeddings_dir run/embeddings --output_dir run/quantizer".split(),
        *"--modalities collaborative --num_quantizers 2 --codebook_size 4 --codebook_dim 8".split(),
        *"--encoder_hidden_dims 8".split(), *SMALL,
    ],
    "finetune": [
        "finetune", *PREPARED, *"--embeddings_dir run/embeddings --quantizer_dir run/quantizer".split(),
        *"--hidden_size 8 --num_hidden_layers 1 --output_dir run/recommender".split(), *SMALL,
    ],
    "evaluate": [
        "evaluate", *PREPARED, *"--output_dir run/evaluation --model_dirs run/sasrec run/recommender".split(),
        *"--use_cpu true --bootstrap_resamples 10".split(),
    ],
    "compare": [
        "compare", *PREPARED, *"--output_dir run/comparison --evaluation_dirs run/evaluation".split(),
        *"--bootstrap_resamples 10".split(),
    ],
    "recommend": [
        "recommend", *PREPARED, *"--model_dir run/recommender --output_file run/recommended/users.jsonl".split(),
        *"--use_cpu true".split(),
    ],
    "index": "index --model_dir run/recommender --output_dir run/index --use_cpu true".split(),
    "report": ["report", *PREPARED, *"--run_dir run --num_users 3 --use_cpu true".split()],
}  # fmt: skip
# What else than its default makes other outputs of a stage, which its directory may hold from before.
OLDER = {
    "prepare": ["--seed", "1"],
    "sasrec": ["--seed", "1"],
    "encoder": ["--seed", "1"],
    "embed_text": ["--normalize", "false"],
    "quantize": ["--seed", "1"],
    "finetune": ["--seed", "1"],
    "evaluate": ["--seed", "1"],
    "compare": ["--seed", "1"],
    "index": ["--kind", "hnsw"],
}
# Stages that leave no record: they do their work again.
WITHOUT_RECORD = ("recommend", "report")
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
            importlib.import_module("mmesid.trainer.cli").main([*COMMANDS[stage], *flags])

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


def killed_everywhere(
    harness: Harness, stage: str, snapshot: Path, work: Path, expected: dict, arguments, older: bool = False
) -> None:
    """One run leaves what a kill at each point would leave, from which the next ones start."""
    states = harness.root / "states"
    shutil.rmtree(states, ignore_errors=True)
    fresh(snapshot, work)
    if older and harness.start(stage, work, flags=OLDER[stage]) != 0:
        harness.fault(stage, "older outputs", harness.said(), work)
    harness.start(stage, work, partial(keep_states, str(work), states))
    what = "killed-over-older-outputs" if older else "killed"
    for state in sorted(states.iterdir())[:: arguments.step]:
        harness.check(stage, f"{what} before change {int(state.name)}", fresh(state, work), expected)
    shutil.rmtree(states)


def killed_over_older_outputs(harness: Harness, stage: str, *others) -> None:
    if stage in OLDER:
        killed_everywhere(harness, stage, *others, older=True)


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
    (flag,) = {"--output_dir", "--output_file", "--run_dir"} & {*COMMANDS[stage]}
    output = work / COMMANDS[stage][COMMANDS[stage].index(flag) + 1]
    output = output.parent if flag == "--output_file" else output
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
        if stage not in WITHOUT_RECORD and "is up to date" not in (harness.root / "log").read_text():
            harness.fault(stage, "moved clock", "an unchanged run is made again", work)


TRIALS = {
    "killed": killed_everywhere,
    "older": killed_over_older_outputs,
    "random": killed_at_random,
    "files": full_files,
    "disk": full_disk,
    "read_only": read_only,
    "two": two_at_once,
    "clock": moved_clock,
}


def warm_up() -> None:
    """Imports and fills, before the first fork, what every run would; nothing of it starts a thread."""
    for command in COMMANDS.values():
        importlib.import_module(f"mmesid.trainer.stages.{command[0]}")
    for module in (
        "accelerate", "datasets", "faiss", "matplotlib.pyplot", "peft", "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama", "mmesid.trainer.data.sources.synthetic",
        "mmesid.trainer.encoders.dual_encoder", "mmesid.trainer.encoders.sasrec",
    ):  # fmt: skip
        importlib.import_module(module)
    from mmesid.hub_cards import cards, figures

    for template in cards._ENVIRONMENT.list_templates(filter_func=lambda name: name.endswith(".md.jinja")):
        cards._ENVIRONMENT.get_template(template)
    with tempfile.NamedTemporaryFile(suffix=".png") as picture:
        figures.draw_singular_spectrum(picture.name, {"text": np.array([2.0, 1.0, 0.1])}, 0.01)
    # The collector passes over what the parent holds, in every fork.
    gc.freeze()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--step", type=int, default=1, help="try every n-th change of a file")
    parser.add_argument("--random", type=int, default=50, help="kills at random times per stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    arguments = parser.parse_args(argv)

    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    warm_up()

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
            fresh(root / "undisturbed", snapshot)
            if harness.start(stage, root / "undisturbed") != 0:
                print(harness.said(), file=sys.stderr)
                return 1
            if stage not in arguments.stages:
                continue
            remaining = remaining - {stage}
            expected = contents(root / "undisturbed")
            for name in arguments.trials:
                TRIALS[name](harness, stage, snapshot, work, expected, arguments)
                print(f"{stage}, {name}: {time.monotonic() - begin:.0f} s", flush=True)
            done = {name.split()[1]: count for name, count in harness.counts.items() if name.split()[0] == stage}
            print(f"{stage}: {done}, {len(harness.faults)} faults, {time.monotonic() - begin:.0f} s", flush=True)
        print(f"{sum(harness.counts.values())} trials, {len(harness.faults)} faults")
        for fault in harness.faults:
            print(fault)
        return 1 if harness.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""
`make fuzz`: damaged and hostile files, and what their readers make of them.

Every input is a real file with one to three changes: bytes flipped, cut out, doubled or nested deeply, and, where it
is JSON, values replaced by others of any type and size. A reader may accept it or raise a `ValueError` or an
`OSError`, which the command line prints as one sentence. Anything else is a fault, and so are more than 5 seconds,
more than 2 GiB, and a file that is written outside the folder of the input.

    python tests/harness/fuzz.py --inputs 2000 --readers configuration recipe

It prints counts per reader and the first input of each fault by its seed: `--first SEED --inputs 1` shows where it
comes from.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2]))

from tests.faults import WRITING, forked, status_of  # noqa: E402


SECONDS, BYTES = 5, 2 * 2**30
# Inputs that one fork reads, one after the other.
BATCH = 250
WEIRD = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.5, 10**4, 10**6, 10**9, 2**31, 2**63, 10**30, 1e308, math.nan, math.inf,
    "", "x", "../x", "/etc/passwd", "\x00", "\ud800", "a" * 10_000, [], [1], [None], [[]], ["x", "x"], {}, {"x": 1},
    {"": {}}, [10**9] * 3,
]  # fmt: skip


class TooSlow(BaseException):
    pass


def changed(content: bytes, name: str, draw: random.Random) -> bytes:
    """The content with one to three changes."""
    for _ in range(draw.randint(1, 3)):
        if name.endswith((".json", ".jsonl")) and draw.random() < 0.6:
            try:
                content = json.dumps(_changed_value(json.loads(content), draw)).encode("utf-8", "surrogatepass")
                continue
            except (ValueError, RecursionError):
                pass
        at, length = draw.randint(0, len(content)), draw.choice([1, 2, 8, 100])
        part = content[at : at + length]
        content = content[:at] + draw.choice(
            [
                b"", part * 2, bytes(draw.randrange(256) for _ in part), b"\xff\xfe\x00", b'{"a":' * 3000, b"[" * 3000,
                b"- " * 3000, b"9" * 400, b"-" + part, b'"', b"\n" + part, b"&a [*a]", b"NaN", b"null", part[::-1],
            ]  # fmt: skip
        ) + content[at + length :]  # fmt: skip
        if draw.random() < 0.1:
            content = content[: draw.randint(0, len(content))]
    return content


def _changed_value(value, draw: random.Random):
    """A JSON value of which one member, at any depth, is another, or is gone."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {name: member for name, member in value.items() if name != key}
        if kind < 0.2:
            return value | {draw.choice(["x", "auto_map", "__class__", key.upper()]): draw.choice(WEIRD)}
        return value | {key: _changed_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.2:
            return value[:at] + value[at + 1 :]
        if kind < 0.3:
            return value + value[at : at + 1] * draw.choice([1, 1000])
        return [*value[:at], _changed_value(value[at], draw), *value[at + 1 :]]
    return draw.choice(WEIRD)


def models(root: Path) -> dict[str, Path]:
    """One checkpoint of each kind, a processor, and the directory of a stage."""
    from mmesid.trainer.recommender.small_llama import train_tokenizer
    from modeling_mmesid import (
        MMESIDProcessor,
        MMRQVAEConfig,
        MMRQVAEModel,
        SASRecConfig,
        SASRecForSequentialRecommendation,
    )
    from tests.modeling_mmesid.conftest import NUM_ITEMS, new_model

    SASRecForSequentialRecommendation(SASRecConfig(num_items=9, hidden_size=8)).save_pretrained(root / "sasrec")
    quantizer = MMRQVAEConfig(modalities=["text"], embedding_dims=[6], codebook_size=4, codebook_dim=4)
    MMRQVAEModel(quantizer).save_pretrained(root / "quantizer")
    new_model().save_pretrained(root / "recommender")
    ids = [f"sku{row}" for row in range(1, NUM_ITEMS + 1)]
    tokenizer = train_tokenizer(["a red shirt", "blue shoes"] * 20, 300)
    MMESIDProcessor(tokenizer, ids, ids).save_pretrained(root / "processor")
    return {name: root / name for name in ("sasrec", "quantizer", "recommender", "processor")}


def readers(root: Path) -> dict[str, list[tuple[Path, list[str], Callable[[Path], object]]]]:
    """By its name, what a reader reads: directories, the files in it that are changed, and the call."""
    from mmesid.trainer.cli import STAGES
    from mmesid.trainer.publishing.repository import publication
    from mmesid.trainer.recipes import plan, read_recipe
    from mmesid.trainer.running.arguments import parse
    from mmesid.trainer.running.files import to_flags
    from mmesid.trainer.running.records import StageRecord, StageRun, input_digest
    from mmesid.trainer.stages.sasrec import SASRecArguments
    from modeling_mmesid import (
        MMESIDForSequentialRecommendation,
        MMESIDProcessor,
        MMRQVAEModel,
        SASRecForSequentialRecommendation,
    )
    from tests.harness.faults import COMMANDS

    found = models(root)
    classes = {
        "sasrec": SASRecForSequentialRecommendation,
        "quantizer": MMRQVAEModel,
        "recommender": MMESIDForSequentialRecommendation,
    }
    (root / "recipe").mkdir()
    shutil.copy(Path(__file__).parents[2] / "examples" / "recipes" / "quickstart.yaml", root / "recipe" / "r.yaml")
    (root / "settings").mkdir()
    (root / "settings" / "s.yaml").write_text(
        "prepared_dir: prepared\noutput_dir: out\nhidden_size: 16\nseed: 3\nbf16: null\nlearning_rate: 1.0e-3\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nhub_links: [dataset=me/data]\neval_strategy: epoch\n"
    )
    os.chdir(root)
    for stage in ("prepare", "sasrec"):
        import importlib

        importlib.import_module(f"mmesid.trainer.stages.{stage}").main(COMMANDS[stage][1:])

    def read_record(directory: Path) -> None:
        StageRecord.load(directory)
        input_digest(directory)
        publication(directory, "me/it")
        arguments = parse(SASRecArguments, [*COMMANDS["sasrec"][1:], "--output_dir", str(directory)])
        run = StageRun("sasrec", arguments, {"prepared_dir": arguments.prepared_dir})
        if not run.is_up_to_date():
            with run as staging:
                (staging / "model.safetensors").write_bytes(b"")

    def read_plan(directory: Path) -> None:
        for _, settings in plan(directory / "r.yaml", read_recipe(directory / "r.yaml", STAGES), STAGES):
            to_flags(settings)

    configurations = [(found[name], ["config.json"], call.from_pretrained) for name, call in classes.items()]
    weights = [(found[name], ["model.safetensors"], call.from_pretrained) for name, call in classes.items()]
    of_processor = [path.name for path in found["processor"].iterdir() if path.suffix in (".json", ".jinja")]
    return {
        "configuration": configurations,
        "weights": weights,
        "processor": [(found["processor"], of_processor, MMESIDProcessor.from_pretrained)],
        "record": [(root / "run" / "sasrec", ["record.json", "companions.json"], read_record)],
        "recipe": [(root / "recipe", ["r.yaml"], read_plan)],
        "settings": [(root / "settings", ["s.yaml"], lambda path: parse(SASRecArguments, [str(path / "s.yaml")]))],
    }


def read(call: Callable[[Path], object], directory: Path) -> str:
    """`accepted`, the name of a named error, or what is wrong."""

    def too_slow(*_) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    begin = time.monotonic()
    try:
        call(directory)
        return "accepted"
    except (ValueError, OSError) as error:
        if time.monotonic() - begin > SECONDS:
            return "FAULT more than 5 s"
        return "ValueError" if isinstance(error, ValueError) else "OSError"
    except TooSlow:
        return "FAULT more than 5 s"
    except MemoryError:
        return "FAULT more than 2 GiB"
    except BaseException as error:
        traceback.print_exc()
        return f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)


def batch(name: str, root: Path, chosen: list, seeds: range, results: Path) -> None:
    """Reads the inputs of these seeds and writes a line for each, before and after."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    outside: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            path = str(arguments[0])
            if path.startswith("/") and not path.startswith((str(root), "/dev/", "/proc/")):
                outside.append(path)

    sys.addaudithook(watch)
    with open(results, "a") as lines:
        for seed in seeds:
            draw = random.Random(f"{name} {seed}")
            source, files, call = draw.choice(chosen)
            file = draw.choice(files)
            directory = root / "input"
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(source, directory)
            (directory / file).write_bytes(changed((source / file).read_bytes(), file, draw))
            print(seed, source.name, file, "FAULT killed the process", file=lines, sep="\t", flush=True)
            outside.clear()
            outcome = read(call, directory)
            if outside:
                outcome = f"FAULT wrote {outside[0]}"
            print(seed, source.name, file, outcome, file=lines, sep="\t", flush=True)


def outcomes(results: Path) -> dict[int, tuple[str, ...]]:
    lines = [line.rstrip("\n").split("\t") for line in results.read_text().splitlines()]
    return {int(seed): tuple(rest) for seed, *rest in lines}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs for each reader")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        os.environ |= {"HF_HOME": str(root / "home"), "HF_DATASETS_CACHE": str(root / "home" / "datasets")}
        # Threads that computing starts do not outlive a fork: what is made to be damaged is made in one.
        made: dict = {}
        import torch

        torch.set_num_threads(1)
        made = readers(root)
        for reader in arguments.readers or made:
            results, begin = root / f"{reader}.tsv", time.monotonic()
            results.touch()
            seed, end = arguments.first, arguments.first + arguments.inputs
            while seed < end:
                seeds = range(seed, min(seed + BATCH, end))
                child = forked(
                    lambda: batch(reader, root, made[reader], seeds, results), root / "log", wait=False  # noqa: B023
                )  # fmt: skip
                status_of(child, BATCH * SECONDS)
                # After one that ended the process the next fork goes on.
                seed = max([*outcomes(results), seed - 1]) + 1 if outcomes(results) else seed + 1
            counts = Counter(outcome.split(":")[0] for *_, outcome in outcomes(results).values())
            print(f"{reader}: {dict(counts)}, {time.monotonic() - begin:.0f} s", flush=True)
            for seed, (source, file, outcome) in outcomes(results).items():
                if outcome.startswith("FAULT"):
                    faults[f"{reader}: {outcome}"] += 1
                    if faults[f"{reader}: {outcome}"] == 1:
                        print(f"  seed {seed}, {source}/{file}: {outcome}", flush=True)
            if arguments.inputs == 1:
                print((root / "log").read_text())
    print(f"{sum(faults.values())} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

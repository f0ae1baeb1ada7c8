"""
`make fuzz`: damaged and hostile files, and what their readers make of them.

Every input is a real file with one to three changes: bytes flipped, cut out, doubled or nested deeply, and values of
JSON, of text tables and of columns replaced by others of any type and size. A reader may accept it or raise a
`ValueError` or an `OSError` of one line, which the command line prints. Anything else is a fault, and so are more than
5 seconds, more than 2 GiB, and a file that is written outside the folder of the input.

    python tests/harness/fuzz.py --inputs 2000 --readers configuration recipe

It prints counts per reader and the first input of each fault by its seed: `--first SEED --inputs 1` shows where it
comes from. From seed 0 on, the files as they are come first and must be accepted.
"""

import argparse
import importlib
import json
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
from tests.harness.malformed import malformed  # noqa: E402


# Seconds of the processor; a reader that waits for what never comes has twelve times as many.
SECONDS, BYTES = 5, 2 * 2**30
# Inputs that one fork reads, one after the other.
BATCH = 250
# `datasets` makes a file of each table that it loads: a tenth of the inputs of others.
SLOW = ("parquet, items",)


class TooSlow(BaseException):
    pass


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


def readers(root: Path) -> dict[str, list[tuple[Path, list[str], Callable[[Path, random.Random], object]]]]:
    """By its name, what a reader reads: directories, the files in it that are changed, and the call."""
    from mmesid.trainer.cli import STAGES
    from mmesid.trainer.publishing.repository import publication
    from mmesid.trainer.recipes import plan, read_recipe
    from mmesid.trainer.recommender.evaluation import SPLITS
    from mmesid.trainer.running.arguments import parse
    from mmesid.trainer.running.files import to_flags
    from mmesid.trainer.running.records import StageRecord, StageRun, input_digest
    from mmesid.trainer.stages import compare, report
    from mmesid.trainer.stages.sasrec import SASRecArguments
    from modeling_mmesid import (
        MMESIDForSequentialRecommendation,
        MMESIDProcessor,
        MMRQVAEModel,
        SASRecForSequentialRecommendation,
    )
    from tests.harness.data_files import data_readers
    from tests.harness.faults import COMMANDS, PREPARED

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
    evaluate = [*PREPARED, *"--model_dirs run/sasrec --output_dir run/evaluation --use_cpu true".split()]
    for stage, flags in (
        ("prepare", COMMANDS["prepare"][1:]),
        ("sasrec", COMMANDS["sasrec"][1:]),
        ("evaluate", evaluate),
    ):
        importlib.import_module(f"mmesid.trainer.stages.{stage}").main(flags)
    report.main([*PREPARED, *"--run_dir run --use_cpu true".split()])
    (root / "page").mkdir()
    for name in ("report.html", "report.json"):
        shutil.copy(root / "run" / name, root / "page")
    shutil.copytree(root / "run" / "evaluation", root / "page" / "evaluation")

    def read_record(directory: Path, _) -> None:
        StageRecord.load(directory)
        input_digest(directory)
        publication(directory, "me/it")
        arguments = parse(SASRecArguments, [*COMMANDS["sasrec"][1:], "--output_dir", str(directory)])
        run = StageRun("sasrec", arguments, {"prepared_dir": arguments.prepared_dir})
        if not run.is_up_to_date():
            with run as staging:
                (staging / "model.safetensors").write_bytes(b"")

    def read_evaluation(directory: Path, _) -> None:
        flags = ["--evaluation_dirs", str(directory), "--output_dir", str(directory / "comparison")]
        compare.main([*PREPARED, *flags, "--bootstrap_resamples", "10"])

    def read_page(directory: Path, _) -> None:
        report.main(["--run_dir", str(directory), *PREPARED, "--use_cpu", "true"])

    def read_plan(directory: Path, _) -> None:
        for _, settings in plan(directory / "r.yaml", read_recipe(directory / "r.yaml", STAGES), STAGES):
            to_flags(settings)

    def loader(model_class) -> Callable:
        return lambda directory, _: model_class.from_pretrained(directory)

    configurations = [(found[name], ["config.json"], loader(call)) for name, call in classes.items()]
    weights = [(found[name], ["model.safetensors"], loader(call)) for name, call in classes.items()]
    ranks = [f"ranks/{split}.parquet" for split in SPLITS]
    of_processor = [path.name for path in found["processor"].iterdir() if path.suffix in (".json", ".jinja")]
    return {
        "configuration": configurations,
        "weights": weights,
        "processor": [(found["processor"], of_processor, loader(MMESIDProcessor))],
        "record": [(root / "run" / "sasrec", ["record.json", "companions.json"], read_record)],
        "recipe": [(root / "recipe", ["r.yaml"], read_plan)],
        "settings": [(root / "settings", ["s.yaml"], lambda path, _: parse(SASRecArguments, [str(path / "s.yaml")]))],
        "evaluation": [(root / "run" / "evaluation", ["record.json", "results.json", *ranks], read_evaluation)],
        "report": [(root / "page", ["report.json"], read_page)],
        **data_readers(root / "data"),
    }


def read(call: Callable[[Path, random.Random], object], directory: Path, draw: random.Random) -> str:
    """`accepted`, the name of a named error, or what is wrong."""

    def too_slow(*_) -> None:
        raise TooSlow

    for clock, sent, seconds in ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 12)):
        signal.signal(sent, too_slow)
        signal.setitimer(clock, SECONDS * seconds)
    begin = time.process_time()
    try:
        call(directory, draw)
        outcome = "accepted"
    except (ValueError, OSError) as error:
        outcome = "ValueError" if isinstance(error, ValueError) else "OSError"
        said = str(error).strip()
        if isinstance(error, UnicodeError | json.JSONDecodeError) or "\n" in said or len(said) > 2000:
            traceback.print_exc()
            outcome = f"FAULT no sentence: {type(error).__name__}: {said[:200]!r}"
    except TooSlow:
        traceback.print_exc()
        return "FAULT more than 5 s"
    except MemoryError:
        traceback.print_exc()
        outcome = "FAULT more than 2 GiB"
    except BaseException as error:
        traceback.print_exc()
        outcome = f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "FAULT more than 5 s" if time.process_time() - begin > SECONDS else outcome


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
            source, files, call = draw.choice(chosen) if seed >= 0 else chosen[seed]
            file = draw.choice(files)
            directory = root / "inputs" / "input"
            shutil.rmtree(directory.parent, ignore_errors=True)
            shutil.copytree(source, directory)
            if seed >= 0:
                (directory / file).write_bytes(malformed(file, (source / file).read_bytes(), draw))
            print(seed, source.name, file, "FAULT killed the process", file=lines, sep="\t", flush=True)
            outside.clear()
            outcome = read(call, directory, draw)
            if seed < 0 and outcome != "accepted":
                outcome = f"FAULT a sound file: {outcome}"
            if elsewhere := [*outside, *(path for path in directory.parent.iterdir() if path != directory)]:
                outcome = f"FAULT wrote {elsewhere[0]}"
            print(seed, source.name, file, outcome, file=lines, sep="\t", flush=True)


def outcomes(results: Path) -> dict[int, tuple[str, ...]]:
    lines = [line.rstrip("\n").split("\t") for line in results.read_text().splitlines()]
    return {int(seed): tuple(rest) for seed, *rest in lines}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+")
    parser.add_argument("--inputs", type=int, default=3_200, help="inputs for each reader")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    faults: Counter[str] = Counter()
    total = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        os.environ |= {"HF_HOME": str(root / "home"), "HF_DATASETS_CACHE": str(root / "home" / "datasets")}
        # Threads that computing starts do not outlive a fork: what is made to be damaged is made in one.
        made: dict = {}
        import datasets
        import torch

        torch.set_num_threads(1)
        # Where it was imported before, it has read the variable before.
        datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
        made = readers(root)
        for reader in arguments.readers or made:
            results, begin = root / f"{reader}.tsv", time.monotonic()
            results.touch()
            count = -(-arguments.inputs // 10) if reader in SLOW else arguments.inputs
            seed, end = arguments.first or -len(made[reader]), arguments.first + count
            while seed < end:
                seeds = range(seed, min(seed + BATCH, end))
                child = forked(
                    lambda: batch(reader, root, made[reader], seeds, results), root / "log", wait=False  # noqa: B023
                )  # fmt: skip
                status_of(child, 60 + BATCH * SECONDS)
                # After one that ended the process the next fork goes on.
                seed = max([*outcomes(results), seed - 1]) + 1 if outcomes(results) else seed + 1
            total += len(outcomes(results))
            counts = Counter(outcome.split(":")[0] for *_, outcome in outcomes(results).values())
            print(f"{reader}: {dict(counts)}, {time.monotonic() - begin:.0f} s", flush=True)
            for seed, (source, file, outcome) in outcomes(results).items():
                if outcome.startswith("FAULT"):
                    faults[f"{reader}: {outcome}"] += 1
                    if faults[f"{reader}: {outcome}"] == 1:
                        print(f"  seed {seed}, {source}/{file}: {outcome}", flush=True)
            if arguments.inputs == 1:
                print((root / "log").read_text())
        print(f"{total} inputs, {sum(faults.values())} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
r"""
Side by side with other programs for sequential recommendation, on the same users, items, widths, layers, lengths and
batches: what an epoch of training takes, what the ten best items for every user take, memory, and nDCG@10 on test.

    python examples/benchmarks/peers.py \
        --rectools_python PEERS/rectools/bin/python --replay_python PEERS/replay/bin/python    # --json: one object

Ours are SASRec and a Llama that reads one free ID vector per item; theirs the SASRec, eSASRec and HSTU of RecTools and
the SASRec of RePlay. Those need versions of libraries that ours cannot share, so each has an environment of its own,
and a program without one is left out:

    python -m venv PEERS/rectools && PEERS/rectools/bin/pip install 'rectools[torch]'
    python -m venv PEERS/replay && PEERS/replay/bin/pip install 'replay-rec[torch]'

Every measurement is a process of its own, and the programs take turns (`--rounds`). For speed alone `--steps` ends
training early and an epoch is extrapolated, from all steps of theirs but the first and from all of ours; with
`--steps 0 --epochs 10` training goes to its end and nDCG says something.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from peer_protocol import Setting
from workload import data_folder, markdown_table, spread


# Library, and its programs. The first two are ours.
PROGRAMS = {
    "mmesid": ("SASRec", "ID decoder"),
    "rectools": ("SASRec", "eSASRec", "HSTU"),
    "replay": ("SASRec",),
}
NAMES = {"mmesid": "mmesid", "rectools": "RecTools", "replay": "RePlay"}
# What is compared, what it is called, and the digits that it is printed with.
COLUMNS = {
    "epoch_cpu_seconds": ("epoch, CPU s", ".1f"),
    "epoch_seconds": ("epoch, s", ".1f"),
    "rank_cpu_seconds": ("top 10 for all, CPU s", ".1f"),
    "rank_seconds": ("top 10 for all, s", ".1f"),
    "peak_memory_bytes": ("peak MiB", ".0f"),
    "ndcg@10": ("test nDCG@10", ".4f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir",
        type=data_folder,
        default="../shared/data/beauty",
        help="Folder with sequences.txt and items.jsonl.",
    )
    parser.add_argument("--programs", nargs="+", help="Some of them, as in the table: 'mmesid SASRec' for example.")
    for library in list(PROGRAMS)[1:]:
        parser.add_argument(f"--{library}_python", help=f"Python of an environment with {NAMES[library]}.")
    parser.add_argument("--hidden_size", type=int, default=128, help="Width of items and states.")
    parser.add_argument("--num_hidden_layers", type=int, default=2, help="Blocks.")
    parser.add_argument("--num_attention_heads", type=int, default=2, help="Heads of every block.")
    parser.add_argument("--max_history", type=int, default=50, help="Items that are read.")
    parser.add_argument("--batch_size", type=int, default=128, help="Users in a step.")
    parser.add_argument("--eval_batch_size", type=int, default=256, help="Users ranked at a time.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate of all programs.")
    parser.add_argument("--dropout", type=float, default=0.2, help="Dropout of all programs, wherever they have it.")
    parser.add_argument("--epochs", type=int, default=1, help="Epochs of training.")
    parser.add_argument("--steps", type=int, default=10, help="Steps of theirs that are timed; 0: train to the end.")
    parser.add_argument("--bf16", action="store_true", help="Train under bfloat16 autocast.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of every program.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and orders.")
    parser.add_argument("--rounds", type=int, default=3, help="Times that each program is measured, in turns.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of Markdown.")
    arguments = parser.parse_args()
    pythons = {"mmesid": sys.executable} | {
        library: getattr(arguments, f"{library}_python") for library in list(PROGRAMS)[1:]
    }
    setting = Setting(
        data_dir=str(Path(arguments.data_dir).absolute()),
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(Setting)
            if field.name != "data_dir"
        },
    )
    chosen = [
        (f"{NAMES[library]} {program}", library, program)
        for library, programs in PROGRAMS.items()
        for program in programs
        if pythons[library] and (not arguments.programs or f"{NAMES[library]} {program}" in arguments.programs)
    ]
    if not chosen:
        parser.error(f"none of the programs {arguments.programs} has an environment; name it with --rectools_python")
    measured: dict[str, list[dict]] = {name: [] for name, _, _ in chosen}
    for _ in range(arguments.rounds):
        for name, library, program in chosen:
            measured[name].append(measure(pythons[library], library, program, setting))
            print(f"{name}: {measured[name][-1]}", file=sys.stderr, flush=True)
    result = {
        "programs": {name: summary(runs) for name, runs in measured.items()},
        "rounds": arguments.rounds,
        "setting": dataclasses.asdict(setting) | {"data_dir": Path(setting.data_dir).name},
    }
    result |= ratios(result["programs"])
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def measure(python: str, library: str, program: str, setting: Setting) -> dict:
    """Runs one program in a process of its own, in its own environment."""
    environment = os.environ | {
        name: str(setting.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS")
    }
    if library != "mmesid":
        # Its environment, and nothing of ours.
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    # With it Python would not find the modules beside a script.
    environment.pop("PYTHONSAFEPATH", None)
    process = subprocess.run(
        [
            python,
            str(Path(__file__).with_name(f"peer_{library}.py")),
            program,
            json.dumps(dataclasses.asdict(setting)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if process.returncode:
        raise SystemExit(f"{NAMES[library]} {program} ended with status {process.returncode}; see what it wrote.")
    return json.loads(process.stdout.splitlines()[-1])


def summary(runs: list[dict]) -> dict:
    """Spreads of what differs between the rounds, and what does not as it is."""
    first = runs[0]
    return {
        name: spread([run[name] for run in runs]) if isinstance(value, float) or name == "peak_memory_bytes" else value
        for name, value in first.items()
    }


def ratios(programs: dict[str, dict]) -> dict:
    """How many times the CPU time of our SASRec the fastest peer takes, by medians; nothing without both."""
    ours = programs.get("mmesid SASRec")
    peers = [result for name, result in programs.items() if not name.startswith("mmesid")]
    if ours is None or not peers:
        return {}
    return {
        f"{what}_ratio": min(peer[f"{what}_cpu_seconds"]["median"] for peer in peers)
        / ours[f"{what}_cpu_seconds"]["median"]
        for what in ("epoch", "rank")
    }


def report(result: dict) -> str:
    rows = [
        [name, *(_cell(measured[column], digits) for column, (_, digits) in COLUMNS.items())]
        for name, measured in result["programs"].items()
    ]
    setting = result["setting"]
    packages: dict[str, str] = {}
    for measured in result["programs"].values():
        packages |= measured["versions"]
    lines = [
        markdown_table(["program", *(title for title, _ in COLUMNS.values())], rows),
        "",
        f"Median of {result['rounds']} rounds in turns, minimum and maximum in brackets. {setting['data_dir']}; width "
        f"{setting['hidden_size']}, {setting['num_hidden_layers']} layers, {setting['num_attention_heads']} heads, "
        f"{setting['max_history']} items, batches of {setting['batch_size']}, {setting['epochs']} epochs, "
        f"{'bfloat16' if setting['bf16'] else 'float32'}, {setting['threads']} threads. "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + ".",
    ]
    if "epoch_ratio" in result:
        lines += [
            "",
            f"The fastest peer takes {result['epoch_ratio']:.1f} times as long as our SASRec for an epoch, and "
            f"{result['rank_ratio']:.1f} times for the ten best items of every user (CPU seconds).",
        ]
    return "\n".join(lines)


def _cell(values: dict[str, float], digits: str) -> str:
    scale = 2**20 if digits == ".0f" else 1
    low, middle, high = (format(values[name] / scale, digits) for name in ("minimum", "median", "maximum"))
    return middle if low == high else f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "safetensors", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
How well quantizers keep the distances between items: residual k-means, squared error, the paper's MMD, and the
default, which is trained for the distances.

    python examples/benchmarks/quantizer.py                   # a Markdown table, mean ± deviation of three seeds
    python examples/benchmarks/quantizer.py --seeds 0         # one seed, a third of the time
    python examples/benchmarks/quantizer.py --only "distance (default)"       # one row
    python examples/benchmarks/quantizer.py --json            # one object: `tau` of the default setting, and the table

The data are a folder with `sequences.txt` (on each line a user and the rows of the user's items, oldest first) and
one safetensors table of embeddings per modality, row 0 padding, such as Amazon Beauty's with the paper's own SASRec
vectors.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers.utils import logging

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.tables import import_table
from mmesid.trainer.quantizer.evaluation import code_metrics, encode_items, history_distances
from mmesid.trainer.quantizer.items import ItemTables
from mmesid.trainer.quantizer.trainer import MMRQVAETrainingArguments
from mmesid.trainer.quantizer.training import quantizer_trainer
from mmesid.trainer.running.records import peak_memory_bytes
from mmesid.trainer.running.training import fit
from modeling_mmesid import MMRQVAEConfig


logging.set_verbosity_error()

DEFAULT = "distance (default)"
# Those trained on reconstructions have encoders without a projection, whose code vectors have to keep up with them.
RECONSTRUCTION = {"learning_rate": 1e-3, "per_device_train_batch_size": 1024}
QUANTIZERS = {
    "residual k-means": ({"objective": "mse", "encoder_projection": True, "encoder_hidden_dims": []}, None),
    "MSE": ({"objective": "mse"}, RECONSTRUCTION),
    "MMD (paper)": ({"objective": "paper"}, RECONSTRUCTION),
    DEFAULT: ({"objective": "distance"}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data/beauty"), help="The folder of the data.")
    parser.add_argument(
        "--tables",
        nargs="+",
        default=["collaborative=collaborative_sasrec.safetensors", "text=text_minilm.safetensors"],
        help="modality=file in the folder, the anchor first.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds to average over.")
    parser.add_argument(
        "--only", nargs="+", choices=list(QUANTIZERS), default=list(QUANTIZERS), help="Rows of the table."
    )
    parser.add_argument("--epochs", type=int, help="Instead of the default number.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a Markdown table.")
    arguments = parser.parse_args()
    sequences = read_sequences(arguments.data_dir / "sequences.txt")
    tables = dict(entry.split("=", 1) for entry in arguments.tables)
    with safe_open(arguments.data_dir / next(iter(tables.values())), framework="pt") as file:
        num_items = max(file.get_slice(key).get_shape()[0] for key in file.keys()) - 1
    items = ItemTables(
        {name: import_table(arguments.data_dir / file, name, num_items) for name, file in tables.items()}
    )
    table, deviations = {}, {}
    for name in arguments.only:
        runs = [measure(items, sequences, seed, *QUANTIZERS[name], arguments.epochs) for seed in arguments.seeds]
        table[name] = {metric: float(np.mean([run[metric] for run in runs])) for metric in runs[0]}
        deviations[name] = {metric: float(np.std([run[metric] for run in runs])) for metric in runs[0]}
    memory = peak_memory_bytes() / 2**30
    if arguments.json:
        tau = {modality: table[DEFAULT][f"tau_{modality}"] for modality in tables} if DEFAULT in table else {}
        result = {"tau": tau, "seeds": arguments.seeds, "peak_memory_gib": memory}
        print(json.dumps(result | {"table": table, "standard_deviations": deviations}, indent=2))
        return
    columns = list(next(iter(table.values())))
    print("| quantizer | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for name, values in table.items():
        cells = (f"{values[column]:.4g} ± {deviations[name][column]:.2g}" for column in columns)
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nSeeds {arguments.seeds}, peak memory {memory:.2f} GiB, {torch.get_num_threads()} threads.")


def read_sequences(path: Path) -> Sequences:
    """Every user's last item as the target, and all before it as the history."""
    users, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, *items = line.split()
        users.append(user)
        rows.append(np.array(items, dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum([len(items) - 1 for items in rows])])
    targets = np.array([items[-1] for items in rows], dtype=np.int32)
    return Sequences(users, np.concatenate([items[:-1] for items in rows]), offsets, targets)


def measure(
    items: ItemTables, sequences: Sequences, seed: int, config: dict, training: dict | None, epochs: int | None
) -> dict[str, float]:
    """Makes one quantizer (by its initialisation alone if `training` is None) and measures it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        arguments = MMRQVAETrainingArguments(
            output_dir=directory,
            seed=seed,
            disable_tqdm=True,
            **(training or {}) | ({"num_train_epochs": epochs} if epochs else {}),
        )
        trainer = quantizer_trainer(items.tables, MMRQVAEConfig(**config), arguments)
        # The trainer prints its metrics; standard output is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            if training is not None:
                fit(trainer)
            measured = trainer.measure()
    model = trainer.model
    codes = encode_items(model, items)
    seconds = time.perf_counter() - start
    health = code_metrics(codes, model.config.codebook_size)
    row = {}
    for modality, values in codes.items():
        # The same users whatever the seed of the quantizer.
        taus = history_distances(model, modality, items, values, sequences).metrics()
        row |= {f"{name}_{modality}": value for name, value in taus.items()}
    anchor = model.config.modalities[0]
    row["least use"] = min(value for name, value in health.items() if name.startswith("use@"))
    row[f"collisions_{anchor}"] = health[f"collisions_{anchor}"]
    row["collisions"] = health["collisions"]
    row |= {name: value for name, value in measured.items() if name.startswith("recall@1")}
    row["seconds"] = seconds
    return row


if __name__ == "__main__":
    main()

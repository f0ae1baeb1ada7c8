# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib", "mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
What a step of training and a recommendation cost as the catalogue, the history and the semantic IDs grow, as curves.

    python examples/benchmarks/scaling.py --output_dir docs/figures    # scaling.json and three PNG files

A small Llama on random items and users. CPU seconds of the process, the least of a few runs: a busy machine changes
these little, and nothing else is measured. Ten million items take 13 GiB (`--catalogues 10000 100000`: less).
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, set_seed
from transformers.utils import logging

from mmesid.trainer.recommender.collators import HistoryCollator
from mmesid.trainer.recommender.mmesid_trainer import smoothed_popularity
from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation
from workload import peak_memory, reset_peak_memory


logging.set_verbosity_error()

HIDDEN_SIZE, NUM_HIDDEN_LAYERS = 64, 2
USERS, HISTORY_LENGTH = 16, 9
EMBEDDING_DIM, CODEBOOK_DIM = 384, 64
NUM_CANDIDATES = 8192
PROMPT_TOKENS = (34, 5)
BEAUTY_ITEMS = 12_086
# One row for each prefix costs as the square of what it costs packed; this is enough of it.
LONGEST_SINGLE = 100
# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = (("#0072B2", "o-"), ("#E69F00", "s--"), ("#009E73", "^-."))


def new_model(num_items: int, num_quantizers: int = 0, codebook_size: int = 256, prompt=(0, 0), max_history: int = 50):
    """A recommender of ID vectors, and with `num_quantizers` of one modality with so many codes per item."""
    set_seed(0)
    modalities = ["text"] if num_quantizers else []
    config = MMESIDConfig(
        backbone_config=LlamaConfig(
            vocab_size=512,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=4 * HIDDEN_SIZE,
            num_hidden_layers=NUM_HIDDEN_LAYERS,
            num_attention_heads=1,
            max_position_embeddings=sum(prompt) + max_history,
        ),
        num_items=num_items,
        modalities=modalities,
        embedding_dims=[EMBEDDING_DIM] * len(modalities),
        num_quantizers=num_quantizers,
        codebook_size=codebook_size,
        codebook_dim=CODEBOOK_DIM,
        prompt_prefix_ids=list(range(prompt[0])),
        prompt_suffix_ids=list(range(prompt[1])),
        item_token_scale=HIDDEN_SIZE**0.5,
        max_history=max_history,
    )
    model = MMESIDForSequentialRecommendation(config)
    model.initialize_items(
        torch.ones(num_items + 1, dtype=torch.long),
        embeddings={name: torch.randn(num_items + 1, EMBEDDING_DIM) for name in modalities},
        codes={name: torch.randint(codebook_size, (num_items + 1, num_quantizers)) for name in modalities},
    )
    return model


def users(num_items: int, length: int, count: int = USERS) -> list[dict]:
    items = np.random.default_rng(0).integers(1, num_items + 1, (count, length + 1))
    return [{"history": row[:-1], "targets": row[1:]} for row in items]


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """The least CPU time of some runs, after one that fills the caches."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def training_step(model, examples: list[dict], rounds: int, packed: bool = True, num_candidates: int = 0) -> float:
    """CPU seconds of a step with its optimizer."""
    model.train()
    frequencies = model.model.items.fusion.frequencies
    weights = smoothed_popularity(frequencies) if num_candidates else None
    suffix_ids = model.config.prompt_suffix_ids
    collator = HistoryCollator(model.config.max_history, suffix_ids, packed, num_candidates, weights)
    batch = collator(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return cpu_seconds(step, rounds)


def by_catalogue(sizes: list[int], largest_trained: int, rounds: int) -> dict:
    """Training with the whole catalogue and with a sample of it, and the ten best items of `USERS` users."""
    result: dict = {"training, all items": {}, "training, sampled items": {}, "ten best items": {}, "peak_bytes": {}}
    for size in sizes:
        reset_peak_memory(torch.device("cpu"))
        model = new_model(size).eval()
        histories = [example["history"] for example in users(size, HISTORY_LENGTH)]
        result["ten best items"][size] = cpu_seconds(lambda m=model, h=histories: m.recommend(h), rounds)
        if size <= largest_trained:
            examples = users(size, HISTORY_LENGTH)
            result["training, all items"][size] = training_step(model, examples, rounds)
            result["training, sampled items"][size] = training_step(
                model, examples, rounds, num_candidates=NUM_CANDIDATES
            )
        result["peak_bytes"][size] = peak_memory(torch.device("cpu"))
        del model
        gc.collect()
    return result


def by_history(lengths: list[int], rounds: int) -> dict:
    """Training on histories of one length: items alone, behind the paper's prompt, and one row for each prefix."""
    result: dict = {"items alone": {}, "closing prompt, packed": {}, "closing prompt, a row per prefix": {}}
    for length in lengths:
        examples = users(BEAUTY_ITEMS, length)
        alone = new_model(BEAUTY_ITEMS, max_history=length)
        prompted = new_model(BEAUTY_ITEMS, prompt=PROMPT_TOKENS, max_history=length)
        result["items alone"][length] = training_step(alone, examples, rounds)
        result["closing prompt, packed"][length] = training_step(prompted, examples, rounds)
        if length <= LONGEST_SINGLE:
            result["closing prompt, a row per prefix"][length] = training_step(
                prompted, examples, rounds, packed=False
            )
    return result


def by_codes(levels: list[int], sizes: list[int], rounds: int) -> dict:
    """Training with more codes per item, and with more to choose from at each of four levels."""
    examples = users(BEAUTY_ITEMS, HISTORY_LENGTH)
    return {
        "levels, of 256 codes each": {
            count: training_step(new_model(BEAUTY_ITEMS, count), examples, rounds) for count in levels
        },
        "codes at each of four levels": {
            size: training_step(new_model(BEAUTY_ITEMS, 4, size), examples, rounds) for size in sizes
        },
    }


def draw(path: Path, curves: dict[str, dict[int, float]], xlabel: str, ylabel: str, logarithmic: bool = True) -> None:
    """The curves over a logarithmic axis, seconds on another or from zero, written in one move."""
    figure = Figure(figsize=(5.2, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for (name, values), (colour, style) in zip(curves.items(), STYLES):
        axes.plot(list(values), list(values.values()), style, color=colour, label=name, markersize=4)
    axes.set_xscale("log")
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(max(values.values()) for values in curves.values()))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for scaling.json and the PNG files.")
    parser.add_argument(
        "--catalogues", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000], help="Items."
    )
    parser.add_argument(
        "--largest_trained", type=int, default=1_000_000, help="Train no larger catalogue; the optimizer is in memory."
    )
    parser.add_argument("--histories", type=int, nargs="+", default=[10, 25, 50, 100, 200, 400], help="Items read.")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="Codes per item.")
    parser.add_argument("--codebooks", type=int, nargs="+", default=[64, 256, 1024, 4096], help="Codes per level.")
    parser.add_argument("--rounds", type=int, default=3, help="Times that each point is measured.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    catalogue = by_catalogue(arguments.catalogues, arguments.largest_trained, arguments.rounds)
    history = by_history(arguments.histories, arguments.rounds)
    codes = by_codes(arguments.levels, arguments.codebooks, arguments.rounds)
    result = {"catalogue": catalogue, "history": history, "codes": codes}
    text = json.dumps(result | {"torch": torch.__version__, "users": USERS, "hidden_size": HIDDEN_SIZE}, indent=2)
    partial = arguments.output_dir / ".scaling.json.partial"
    partial.write_text(text + "\n")
    os.replace(partial, arguments.output_dir / "scaling.json")
    curves = {name: values for name, values in catalogue.items() if name != "peak_bytes"}
    label = f"CPU seconds, {USERS} users"
    draw(arguments.output_dir / "scaling_catalogue.png", curves, "items in the catalogue", label)
    draw(arguments.output_dir / "scaling_history.png", history, "items in a history", f"{label}, one step")
    draw(arguments.output_dir / "scaling_codes.png", codes, "codes", f"{label}, one step", logarithmic=False)
    print(text)


if __name__ == "__main__":
    main()

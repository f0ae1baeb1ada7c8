"""What the benchmarks of the recommender measure: real users, a Llama from a configuration, items of three
modalities, and the clock and the memory that they are measured with."""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.sequences import build_sequences
from mmesid.trainer.data.sources.sequence_files import read_sequence_files
from mmesid.trainer.data.windows import TrainingWindows
from mmesid.trainer.recommender.small_llama import new_llama_config, train_tokenizer
from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation, MMESIDProcessor
from modeling_mmesid.processing_mmesid import SYSTEM_PROMPT, USER_PROMPT


logging.set_verbosity_error()

MODALITIES = ("collaborative", "text", "visual")
NUM_QUANTIZERS, CODEBOOK_SIZE, CODEBOOK_DIM = 4, 256, 128
LARGEST_LOSS_DIFFERENCE = 1e-4


def data_folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(
            f"'{path}' does not exist; name a folder with sequences.txt and items.jsonl, as `mmesid prepare "
            "--source sequences` reads it"
        )
    return Path(path)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir",
        type=data_folder,
        default="../shared/data/beauty",
        help="Folder with sequences.txt and items.jsonl.",
    )
    parser.add_argument(
        "--form",
        choices=("paper", "shared"),
        default="paper",
        help="paper: token MLP, score head, projections; shared: one table for token and score, with ID vectors.",
    )
    parser.add_argument("--hidden_size", type=int, default=256, help="Width of the Llama.")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="Layers of the Llama.")
    # Collaborative and text as in the data folder of Amazon Beauty, visual as wide as text.
    parser.add_argument(
        "--embedding_dims",
        type=int,
        nargs=len(MODALITIES),
        default=[64, 384, 384],
        help=f"Widths of the item tables: {', '.join(MODALITIES)}.",
    )
    parser.add_argument("--max_history", type=int, default=50, help="Longest history that is read.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="Where to measure.")
    parser.add_argument("--bf16", action="store_true", help="Run the model under bfloat16 autocast.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, item tables and the users drawn.")
    parser.add_argument("--rounds", type=int, default=3, help="Times that each side is measured, in turns.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of Markdown.")
    return parser


@dataclass
class Workload:
    """
    Args:
        splits (`dict[str, Sequences]`): Train, validation and test.
        frequencies (`torch.LongTensor`): `(items + 1,)` occurrences in the training split.
        prompt_ids (`tuple[list[int], list[int]]`): The paper's prompt before and after the items.
        tokenizer (`PreTrainedTokenizerFast`): Trained on the items' texts and the prompt.
    """

    splits: dict[str, Sequences]
    frequencies: torch.Tensor
    prompt_ids: tuple[list[int], list[int]]
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, data_dir: Path) -> "Workload":
        """Reads the users and trains a tokenizer on the items' texts and the prompt."""
        source = read_sequence_files(data_dir)
        sequences = build_sequences(source.interactions, len(source.catalogue))
        user_ids = source.interactions.user_ids
        splits = {}
        for name in ("train", "validation", "test"):
            users, histories, offsets, targets = sequences.split(name)
            splits[name] = Sequences([user_ids[user] for user in users], histories, offsets, targets)
        texts = source.catalogue.texts()
        tokenizer = train_tokenizer([*texts, *[SYSTEM_PROMPT, USER_PROMPT] * len(texts)], 4096)
        return cls(
            splits=splits,
            frequencies=torch.from_numpy(sequences.training_frequencies()).long(),
            prompt_ids=MMESIDProcessor(tokenizer, source.catalogue.item_ids).prompt_ids(),
            tokenizer=tokenizer,
        )

    def training_users(self, max_history: int, users: int, seed: int) -> list[dict]:
        """Training examples (`history`, `targets`) of randomly drawn users, longest first."""
        windows = TrainingWindows(self.splits["train"], max_history)
        drawn = random.Random(seed).sample(range(len(windows)), min(users, len(windows)))
        return sorted((windows[index] for index in drawn), key=lambda example: -len(example["history"]))

    def new_model(
        self, arguments: argparse.Namespace, frequencies: torch.Tensor | None = None
    ) -> MMESIDForSequentialRecommendation:
        """
        The recommender with random weights and random item tables, which cost what real ones do.

        Args:
            arguments (`argparse.Namespace`): The shared flags.
            frequencies (`torch.LongTensor` of shape `(items + 1,)`, *optional*): Those of another catalogue.
        """
        set_seed(arguments.seed)
        frequencies = self.frequencies if frequencies is None else frequencies
        rows = len(frequencies)
        prefix_ids, suffix_ids = self.prompt_ids
        longest = len(prefix_ids) + arguments.max_history + len(suffix_ids)
        backbone_config = new_llama_config(self.tokenizer, arguments.hidden_size, arguments.num_hidden_layers, longest)
        backbone_config.attention_dropout = 0.0
        config = MMESIDConfig(
            backbone_config=backbone_config,
            num_items=rows - 1,
            modalities=list(MODALITIES),
            embedding_dims=arguments.embedding_dims,
            num_quantizers=NUM_QUANTIZERS,
            codebook_size=CODEBOOK_SIZE,
            codebook_dim=CODEBOOK_DIM,
            share_item_table=arguments.form == "shared",
            use_item_ids=arguments.form == "shared",
            # Both sides are to have the same loss, in training too.
            token_dropout=0.0,
            output_dropout=0.0,
            prompt_prefix_ids=prefix_ids,
            prompt_suffix_ids=suffix_ids,
            max_history=arguments.max_history,
        )
        model = MMESIDForSequentialRecommendation(config)
        model.initialize_items(
            frequencies,
            embeddings={
                name: torch.randn(rows, dim) for name, dim in zip(MODALITIES, arguments.embedding_dims, strict=True)
            },
            codes={name: torch.randint(CODEBOOK_SIZE, (rows, NUM_QUANTIZERS)) for name in MODALITIES},
        )
        return model.to(arguments.device)


def precision(arguments: argparse.Namespace) -> AbstractContextManager:
    """Bfloat16 autocast if the flags ask for it."""
    return torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time of `work`."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], None], reference: Callable[[], None], rounds: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of both, measured in turns, so that a busy machine slows both."""
    measured = [(seconds(ours, device), seconds(reference, device)) for _ in range(rounds)]
    return [pair[0] for pair in measured], [pair[1] for pair in measured]


def spread(values: list[float]) -> dict[str, float]:
    return {"minimum": min(values), "median": statistics.median(values), "maximum": max(values)}


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak so far. On the CPU this is the kernel's own mark of the process, which Linux alone resets."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak_memory`: resident in the process, or allocated on the accelerator."""
    if device.type == "cpu":
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return torch.cuda.max_memory_allocated(device)


def in_subprocess(*flags: str) -> dict:
    """Runs this benchmark again with further flags, alone in a process, and reads the JSON that it prints."""
    process = subprocess.run([sys.executable, *sys.argv, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def setting(arguments: argparse.Namespace, model: MMESIDForSequentialRecommendation) -> dict:
    """What was measured, for the report."""
    return {
        "data": arguments.data_dir.name,
        "items": model.config.num_items,
        "form": arguments.form,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "embedding_dims": dict(zip(MODALITIES, arguments.embedding_dims, strict=True)),
        "prompt_tokens": [len(model.config.prompt_prefix_ids), len(model.config.prompt_suffix_ids)],
        "device": str(arguments.device),
        "bf16": arguments.bf16,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "seed": arguments.seed,
    }


def setting_sentence(setting: dict) -> str:
    before, after = setting["prompt_tokens"]
    return (
        f"{setting['data']}, {setting['items']:,} items, {setting['form']} form, modalities "
        f"{', '.join(f'{name} {dim}' for name, dim in setting['embedding_dims'].items())} (random tables); Llama of "
        f"{setting['num_hidden_layers']} layers, {setting['hidden_size']} wide, {before} + {after} prompt tokens; "
        f"{setting['device']}, {'bfloat16' if setting['bf16'] else 'float32'}, {setting['threads']} threads, "
        f"{setting['rounds']} rounds in turns, seed {setting['seed']}."
    )


def markdown_table(columns: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])

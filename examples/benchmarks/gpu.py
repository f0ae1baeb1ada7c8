# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
What fine-tuning a large decoder costs on an accelerator, without a download: a Llama-3-8B and a Llama-3.2-1B of random
weights in bfloat16 under LoRA, on users as long as those of Amazon Beauty with 12,086 items of two modalities.

    python examples/benchmarks/gpu.py                              # both shapes; some minutes on an H100 or H200
    python examples/benchmarks/gpu.py --sequences beauty/sequences.txt    # the users themselves
    python examples/benchmarks/gpu.py --shape tiny                 # on a CPU: whether it runs

Users per second, positions per second (`tokens/s`; the prompt that all users share and padding are not counted), the
share of the card's peak (MFU), memory, and what an epoch takes, for prefixes packed into one sequence per user and
alone, with SDPA and FlexAttention, and with each loss that the device has. Before anything is timed all of these must
give the same loss for the same users.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel, set_seed
from transformers.utils import logging

from mmesid.trainer.recommender.attention_trial import use_attention
from mmesid.trainer.recommender.collators import HistoryCollator
from modeling_mmesid import MMESIDConfig, MMESIDForSequentialRecommendation, loss_catalogue
from workload import markdown_table, peak_memory, reset_peak_memory, seconds, spread


logging.set_verbosity_error()

# Llama-3-8B, Llama-3.2-1B, and one for a look on a CPU.
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
NUM_QUANTIZERS, CODEBOOK_SIZE, CODEBOOK_DIM = 4, 256, 128
# Of Amazon Beauty: how many users train on 2, 3, 4 ... 50 positions, the last with all that are longer.
BEAUTY_USERS = (
    7153, 4215, 2677, 1813, 1360, 880, 688, 558, 442, 360, 262, 207, 213, 138, 121, 113, 117, 81, 65, 74, 73, 62, 53,
    44, 44, 38, 30, 39, 20, 18, 22, 18, 26, 21, 22, 15, 17, 8, 10, 9, 15, 7, 11, 8, 5, 7, 9, 8, 136,
)  # fmt: skip
PLAIN = "plain"
LOSSES = (PLAIN, "cut-cross-entropy", "liger-kernel")
# Dense bfloat16, in TFLOP/s, by a part of the card's name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
# Of the losses of one batch; bfloat16 keeps three digits.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    packing: str
    attention: str
    loss: str

    @property
    def packed(self) -> bool:
        return self.packing == "packed"


@dataclass
class Users:
    """Training examples (`history`, `targets`) in batches of like length, as the trainer makes them."""

    examples: list[dict]
    batch_users: int
    max_history: int

    def batches(self, count: int) -> list[list[dict]]:
        """So many batches, spread evenly over all, so that their mean length is that of an epoch."""
        starts = np.arange(0, len(self.examples), self.batch_users)
        picked = np.unique(np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(int))
        return [self.examples[start : start + self.batch_users] for start in starts[picked]]


def read_users(sequences: Path | None, num_users: int | None, batch_users: int, max_history: int, seed: int) -> Users:
    """The training positions of a file of sequences, or users of Beauty's lengths with items drawn at random."""
    generator = np.random.default_rng(seed)
    if sequences is None:
        lengths = np.repeat(np.arange(len(BEAUTY_USERS)) + 2, BEAUTY_USERS)
        rows = [generator.integers(1, 12_087, length + 1) for length in lengths]
    else:
        with open(sequences) as file:
            users = [line.split()[1:] for line in file]
        names: dict[str, int] = {}
        # Without the validation and the test target.
        rows = [
            np.array([names.setdefault(item, len(names) + 1) for item in items])[:-2][-(max_history + 1) :]
            for items in users
        ]
        rows = [items for items in rows if len(items) > 1]
    if num_users is not None:
        rows = [rows[user] for user in generator.permutation(len(rows))[:num_users]]
    rows.sort(key=lambda items: -len(items))
    return Users([{"history": items[:-1], "targets": items[1:]} for items in rows], batch_users, max_history)


class Training:
    """A recommender of one shape with its optimizer, and the steps that it takes."""

    def __init__(self, shape: str, num_items: int, arguments: argparse.Namespace):
        set_seed(arguments.seed)
        self.device = arguments.device
        self.dtype = torch.float32 if arguments.float32 else torch.bfloat16
        before, after = arguments.prompt_tokens
        config = LlamaConfig(
            **SHAPES[shape],
            max_position_embeddings=before + arguments.max_history + after,
            rope_theta=500_000.0,
            attn_implementation="sdpa",
        )
        with torch.device(self.device):
            backbone = LlamaModel(config).to(self.dtype)
            width = arguments.embedding_dim
            names = ("text", "visual")
            self.model = MMESIDForSequentialRecommendation(
                MMESIDConfig(
                    backbone_config=config,
                    # Frozen weights are those of some base model.
                    base_model_name_or_path=f"random-{shape}",
                    lora=LORA,
                    num_items=num_items,
                    modalities=list(names),
                    embedding_dims=[width] * len(names),
                    num_quantizers=NUM_QUANTIZERS,
                    codebook_size=CODEBOOK_SIZE,
                    codebook_dim=CODEBOOK_DIM,
                    prompt_prefix_ids=torch.randint(config.vocab_size, (before,)).tolist(),
                    prompt_suffix_ids=torch.randint(config.vocab_size, (after,)).tolist(),
                    max_history=arguments.max_history,
                ),
                backbone=backbone,
            )
            self.model.initialize_items(
                torch.ones(num_items + 1, dtype=torch.long),
                embeddings={name: torch.randn(num_items + 1, width) for name in names},
                codes={name: torch.randint(CODEBOOK_SIZE, (num_items + 1, NUM_QUANTIZERS)) for name in names},
            )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    @cached_property
    def decoder_parameters(self) -> int:
        """Of the decoder's linear layers, which every position goes through; without embeddings and adapter."""
        linear = [module for module in self.model.model.backbone.modules() if isinstance(module, torch.nn.Linear)]
        return sum(module.weight.numel() for module in linear if not module.weight.requires_grad)

    def inputs(self, way: Way, examples: list[dict]) -> dict[str, torch.Tensor]:
        config = self.model.config
        collator = HistoryCollator(config.max_history, config.prompt_suffix_ids, packed=way.packed)
        return {name: tensor.to(self.device) for name, tensor in collator(examples).items()}

    def loss(self, way: Way, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with (
            use_attention(self.model.model.backbone, way.attention),
            use_loss(way.loss),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16),
        ):
            return self.model(**inputs).loss

    def step(self, way: Way, inputs: dict[str, torch.Tensor]) -> None:
        self.loss(way, inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def use_loss(name: str) -> Iterator[None]:
    """Lets the loss over the catalogue be computed by one kernel, whatever the model would choose."""
    chosen = loss_catalogue.fused_kernel
    loss_catalogue.fused_kernel = lambda *args, **kwargs: None if name == PLAIN else name
    try:
        yield
    finally:
        loss_catalogue.fused_kernel = chosen


def available_losses(device: torch.device) -> list[str]:
    """The plain loss, and the kernels that are installed, on CUDA."""
    installed = {
        "cut-cross-entropy": loss_catalogue.linear_cross_entropy,
        "liger-kernel": loss_catalogue.liger_fused_linear_cross_entropy,
    }
    return [name for name in LOSSES if name == PLAIN or (device.type == "cuda" and installed[name] is not None)]


def ways(device: torch.device) -> list[Way]:
    """All ways that a device has. To single prefixes FlexAttention has nothing to skip, and on a CPU no gradient."""
    attentions = {"packed": ["sdpa", "flex_attention"] if device.type == "cuda" else ["sdpa"], "single": ["sdpa"]}
    return [
        Way(packing, attention, loss)
        for packing, of_packing in attentions.items()
        for attention in of_packing
        for loss in available_losses(device)
    ]


def counts(training: Training, examples: list[dict], packed: bool) -> dict[str, int]:
    """Positions that a step of these users reads and pairs of positions that attend to each other, without padding;
    targets."""
    before, after = (
        len(ids) for ids in (training.model.config.prompt_prefix_ids, training.model.config.prompt_suffix_ids)
    )
    lengths = np.array([len(example["history"]) for example in examples])
    # Of the closing tokens of a prefix of each length: they see prompt, items and each other.
    prefixes = np.concatenate([np.arange(1, length + 1) for length in lengths])
    closing = after * (before + prefixes) + after * (after + 1) // 2
    read = lengths if packed else prefixes
    items = read * before + read * (read + 1) // 2
    return {
        "positions": int(read.sum() + after * len(prefixes)),
        "pairs": int(items.sum() + closing.sum()),
        "targets": len(prefixes),
    }


def flops(training: Training, counted: dict[str, int]) -> float:
    """
    Operations that a step needs, forward and backward. The decoder is frozen: its weights are used forward and for the
    gradient of what enters them, the adapter is small. The catalogue's logits and both gradients take three products,
    the projections of its embeddings two.
    """
    config = training.model.config
    decoder, hidden = config.get_text_config(), config.hidden_size
    heads_width = decoder.num_attention_heads * decoder.head_dim
    linear = 2 * 2 * training.decoder_parameters * counted["positions"]
    # Scores and values forward, twice as many products backward.
    attention = 3 * 2 * 2 * heads_width * decoder.num_hidden_layers * counted["pairs"]
    scores = 3 * 2 * counted["targets"] * config.num_items * hidden
    items = 2 * 2 * config.num_items * hidden * (sum(config.embedding_dims) + len(config.modalities) * CODEBOOK_DIM)
    return float(linear + attention + scores + items)


def check_losses(training: Training, all_ways: list[Way], examples: list[dict]) -> dict[str, float]:
    """The loss of the same users by every way, without dropout; an error if they differ."""
    training.model.eval()
    losses = {}
    with torch.no_grad():
        for way in all_ways:
            losses["/".join((way.packing, way.attention, way.loss))] = float(
                training.loss(way, training.inputs(way, examples))
            )
    training.model.train()
    difference = max(losses.values()) - min(losses.values())
    if not difference < LARGEST_DIFFERENCE[training.dtype]:
        raise AssertionError(f"The losses differ by {difference:.2e}: {losses}.")
    return losses


def measure(training: Training, way: Way, users: Users, arguments: argparse.Namespace) -> dict:
    """Speed and memory of one way, over batches from the longest to the shortest."""
    batches = users.batches(arguments.steps)
    inputs = [training.inputs(way, examples) for examples in batches]
    counted = [counts(training, examples, way.packed) for examples in batches]

    def epoch() -> None:
        for batch in inputs:
            training.step(way, batch)

    try:
        # Kernels are built, the optimizer gets its states, the largest batch comes first.
        epoch()
        reset_peak_memory(training.device)
        times = [seconds(epoch, training.device) for _ in range(arguments.rounds)]
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    peak = arguments.peak_tflops or card_peak(training.device)
    work = sum(flops(training, one) for one in counted)
    measured_users = sum(map(len, batches))
    speed = spread([measured_users / taken for taken in times])
    return {
        "users_per_second": speed,
        "tokens_per_second": sum(one["positions"] for one in counted) * speed["median"] / measured_users,
        "mfu": work * speed["median"] / measured_users / (peak * 1e12) if peak else None,
        "peak_memory_bytes": peak_memory(training.device),
        "epoch_minutes": len(users.examples) / speed["median"] / 60,
    }


def card_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"], help="Decoders, one by one.")
    parser.add_argument("--sequences", type=Path, help="File with a user and its items on each line, oldest first.")
    parser.add_argument("--users", type=int, help="Draw so many of the users.")
    parser.add_argument("--batch_users", type=int, default=16, help="Users in a step.")
    parser.add_argument("--steps", type=int, default=24, help="Batches that are timed, spread over an epoch.")
    parser.add_argument("--rounds", type=int, default=3, help="Times that they are timed.")
    parser.add_argument("--max_history", type=int, default=50, help="Longest history that is read.")
    parser.add_argument("--embedding_dim", type=int, default=1280, help="Width of the text and of the visual table.")
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        nargs=2,
        default=[34, 5],
        help="Tokens before and after the items; about those of the paper's prompt in Llama 3's chat template.",
    )
    parser.add_argument("--peak_tflops", type=float, help="Peak of the card, for MFU, where its name is not known.")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="Where to measure.",
    )
    parser.add_argument("--float32", action="store_true", help="Train in float32, for an exact comparison of losses.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, tables and users.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of Markdown.")
    arguments = parser.parse_args()
    users = read_users(
        arguments.sequences, arguments.users, arguments.batch_users, arguments.max_history, arguments.seed
    )
    num_items = max(12_086, max(int(example["targets"].max()) for example in users.examples))
    result: dict = {"shapes": {}, "setting": setting(arguments, users, num_items)}
    for shape in arguments.shape:
        training = Training(shape, num_items, arguments)
        all_ways = ways(arguments.device)
        losses = check_losses(training, all_ways, users.batches(3)[-1])
        measured = [
            {"packing": way.packing, "attention": way.attention, "loss": way.loss}
            | measure(training, way, users, arguments)
            for way in all_ways
        ]
        result["shapes"][shape] = {"losses": losses, "ways": measured}
        del training
        gc.collect()
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def setting(arguments: argparse.Namespace, users: Users, num_items: int) -> dict:
    synthetic = "synthetic users of Beauty's lengths"
    return {
        "card": card_name(arguments.device),
        "torch": torch.__version__,
        "precision": "float32" if arguments.float32 else "bfloat16",
        "users": len(users.examples),
        "data": synthetic if arguments.sequences is None else str(arguments.sequences),
        "items": num_items,
        "batch_users": arguments.batch_users,
        "prompt_tokens": arguments.prompt_tokens,
        "embedding_dim": arguments.embedding_dim,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }


def report(result: dict) -> str:
    rows = []
    for shape, measured in result["shapes"].items():
        for way in measured["ways"]:
            name = [shape, way["packing"], way["attention"], way["loss"]]
            if "out_of_memory" in way:
                rows.append([*name, "out of memory", "", "", "", ""])
                continue
            speed = way["users_per_second"]
            rows.append(
                [
                    *name,
                    f"{speed['median']:.1f} ({speed['minimum']:.1f} to {speed['maximum']:.1f})",
                    f"{way['tokens_per_second']:,.0f}",
                    "unknown" if way["mfu"] is None else f"{way['mfu']:.1%}",
                    f"{way['peak_memory_bytes'] / 2**30:.1f}",
                    f"{way['epoch_minutes']:.1f}",
                ]
            )
    setting = result["setting"]
    before, after = setting["prompt_tokens"]
    columns = ["shape", "prefixes", "attention", "loss", "users/s", "tokens/s", "MFU", "peak GiB", "epoch, min"]
    return (
        f"{markdown_table(columns, rows)}\n\n{setting['card']}, torch {setting['torch']}, {setting['precision']}, "
        f"LoRA r {LORA['r']}; {setting['data']}, {setting['users']:,} users, {setting['items']:,} items, text and "
        f"visual {setting['embedding_dim']} wide, {before} + {after} prompt tokens, batches of "
        f"{setting['batch_users']} users, {setting['steps']} of them spread over an epoch, {setting['rounds']} rounds."
    )


if __name__ == "__main__":
    main()

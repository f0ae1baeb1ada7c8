# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
Speed of training in users per second, and its peak memory: packed prefixes and one fused table against the reference
procedure (`reference.py`).

    python examples/benchmarks/finetune_speed.py           # Markdown, some minutes on two cores
    python examples/benchmarks/finetune_speed.py --json    # one object: `ratio` is the median over the rounds

Both sides train the same weights on the same users, each step with its optimizer, and must agree on the loss. The peak
memory of each side is measured in a process of its own.
"""

import argparse
import json
import math

import torch

import reference
from mmesid.trainer.recommender.collators import HistoryCollator
from modeling_mmesid import MMESIDForSequentialRecommendation
from workload import (
    LARGEST_LOSS_DIFFERENCE,
    Workload,
    alternate,
    argument_parser,
    in_subprocess,
    markdown_table,
    peak_memory,
    precision,
    reset_peak_memory,
    setting,
    setting_sentence,
    spread,
)


SIDES = ("ours", "reference")


class Training:
    """One side: its model, its optimizer and its batches of the same users."""

    def __init__(self, side: str, arguments: argparse.Namespace, workload: Workload):
        self.arguments, self.side = arguments, side
        self.model: MMESIDForSequentialRecommendation = workload.new_model(arguments).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        examples = workload.training_users(arguments.max_history, arguments.users, arguments.seed)
        if side == "reference":
            self.batches = reference.batches(examples, arguments.seed)
            return
        collator = HistoryCollator(arguments.max_history, workload.prompt_ids[1])
        size = arguments.batch_users
        self.batches = [collator(examples[start : start + size]) for start in range(0, len(examples), size)]

    def loss(self, batch) -> torch.Tensor:
        with precision(self.arguments):
            if self.side == "reference":
                return reference.loss(self.model, batch)
            inputs = {name: tensor.to(self.arguments.device) for name, tensor in batch.items()}
            return self.model(**inputs).loss

    def targets(self, batch) -> int:
        return len(batch) if self.side == "reference" else int((batch["labels"] != -100).sum())

    @torch.no_grad()
    def mean_loss(self) -> float:
        """Mean over all targets, before any step."""
        sums = [(float(self.loss(batch)) * self.targets(batch), self.targets(batch)) for batch in self.batches]
        return math.fsum(loss for loss, _ in sums) / sum(targets for _, targets in sums)

    def epoch(self) -> None:
        for batch in self.batches:
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--users", type=int, default=128, help="Users drawn, the same for both sides.")
    parser.add_argument("--batch_users", type=int, default=16, help="Users in one of our steps.")
    parser.add_argument("--memory_of", choices=SIDES, help="Print the peak memory of one side alone, in bytes.")
    arguments = parser.parse_args()
    workload = Workload.load(arguments.data_dir)
    if arguments.memory_of is not None:
        training = Training(arguments.memory_of, arguments, workload)
        reset_peak_memory(arguments.device)
        training.epoch()
        print(json.dumps({"peak_memory_bytes": peak_memory(arguments.device)}))
        return
    memory = {side: in_subprocess("--memory_of", side)["peak_memory_bytes"] for side in SIDES}
    ours, theirs = (Training(side, arguments, workload) for side in SIDES)
    losses = {"ours": ours.mean_loss(), "reference": theirs.mean_loss()}
    difference = abs(losses["ours"] - losses["reference"])
    if difference > LARGEST_LOSS_DIFFERENCE and not arguments.bf16:
        raise AssertionError(f"The losses differ by {difference:.2e}, more than {LARGEST_LOSS_DIFFERENCE}: {losses}.")
    # The first step makes the optimizer's states, and the first round the caches of the libraries.
    for training in (ours, theirs):
        training.loss(training.batches[0]).backward()
        training.optimizer.step()
    times = dict(zip(SIDES, alternate(ours.epoch, theirs.epoch, arguments.rounds, arguments.device)))
    users = min(arguments.users, len(workload.splits["train"]))
    ratios = spread([slow / fast for fast, slow in zip(times["ours"], times["reference"])])
    result = {
        "ratio": ratios["median"],
        "ratios": ratios,
        "users_per_second": {side: spread([users / taken for taken in times[side]]) for side in SIDES},
        "peak_memory_bytes": memory,
        "memory_ratio": memory["ours"] / memory["reference"],
        "loss": losses,
        "loss_difference": difference,
        "users": users,
        "targets": sum(ours.targets(batch) for batch in ours.batches),
        "steps": {"ours": len(ours.batches), "reference": len(theirs.batches)},
        "setting": setting(arguments, ours.model),
    }
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def report(result: dict) -> str:
    rows = [
        [
            side,
            *(f"{result['users_per_second'][side][name]:.1f}" for name in ("minimum", "median", "maximum")),
            result["steps"][side],
            f"{result['peak_memory_bytes'][side] / 2**20:,.0f}",
            f"{result['loss'][side]:.6f}",
        ]
        for side in SIDES
    ]
    columns = ["training", "users/s, minimum", "median", "maximum", "steps", "peak MiB", "loss before"]
    ratios = result["ratios"]
    return (
        f"{markdown_table(columns, rows)}\n\nRatio {ratios['median']:.2f} ({ratios['minimum']:.2f} to "
        f"{ratios['maximum']:.2f}), memory {result['memory_ratio']:.2f}, losses {result['loss_difference']:.1e} "
        f"apart; {result['users']} users with {result['targets']} targets. {setting_sentence(result['setting'])}"
    )


if __name__ == "__main__":
    main()

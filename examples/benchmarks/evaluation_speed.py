# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
Speed of full-ranking evaluation in users per second: the trainer's evaluation of every test user against the reference
procedure (`reference.py`), one user at a time.

    python examples/benchmarks/evaluation_speed.py           # Markdown, some minutes on two cores
    python examples/benchmarks/evaluation_speed.py --json    # one object: `ratio` is the median over the rounds

The reference is timed on users drawn at random; its time grows with their number. Both sides must agree on the loss of
these users, and their ranks are compared. As the published code does, the reference projects the catalogue anew for
every user; `ratio_without_projection` is that to a reference which does it once.
"""

import contextlib
import json
import random
import sys
import tempfile

import numpy as np
import torch
from transformers import TrainingArguments

import reference
from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.windows import EvaluationHistories
from mmesid.trainer.recommender.mmesid_trainer import MMESIDTrainer
from modeling_mmesid.loss_catalogue import catalogue_cross_entropy
from modeling_mmesid.recommendation import mask_histories, pad_histories, score_items, target_ranks
from workload import (
    LARGEST_LOSS_DIFFERENCE,
    Workload,
    alternate,
    argument_parser,
    markdown_table,
    precision,
    seconds,
    setting,
    setting_sentence,
    spread,
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--users", type=int, help="Users that ours ranks; the whole test split by default.")
    parser.add_argument("--reference_users", type=int, default=64, help="Users that the reference ranks per round.")
    parser.add_argument("--batch_users", type=int, default=256, help="Users that ours ranks at a time.")
    arguments = parser.parse_args()
    workload = Workload.load(arguments.data_dir)
    model = workload.new_model(arguments).eval()
    test = workload.splits["test"]
    users = first_users(test, arguments.users or len(test))
    drawn = random.Random(arguments.seed).sample(range(len(users)), min(arguments.reference_users, len(users)))
    sample = [users[user] for user in drawn]

    reference_results: list[tuple[int, float]] = []

    def reference_evaluation() -> None:
        with precision(arguments):
            reference_results[:] = [reference.rank(model, user["history"], user["target"]) for user in sample]

    def reference_without_projection() -> None:
        with precision(arguments), torch.no_grad():
            projected = reference.project_items(model)
        with precision(arguments):
            for user in sample:
                reference.rank(model, user["history"], user["target"], projected)

    with tempfile.TemporaryDirectory() as unused:
        trainer = MMESIDTrainer(
            model,
            TrainingArguments(
                unused,
                per_device_eval_batch_size=arguments.batch_users,
                use_cpu=arguments.device.type == "cpu",
                bf16=arguments.bf16,
                report_to="none",
            ),
        )
        histories = EvaluationHistories(users)
        # The trainer prints its metrics; standard output is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            # The caches of the libraries are filled before the clock starts.
            trainer.rank(EvaluationHistories(first_users(users, arguments.batch_users)))
            reference.rank(model, sample[0]["history"], sample[0]["target"])
            times = alternate(
                lambda: trainer.rank(histories), reference_evaluation, arguments.rounds, arguments.device
            )
            once = [seconds(reference_without_projection, arguments.device) for _ in range(arguments.rounds)]
    loss, ranks = our_results(model, sample)
    reference_ranks = np.array([rank for rank, _ in reference_results])
    losses = {"ours": loss, "reference": float(np.mean([loss for _, loss in reference_results]))}
    difference = abs(losses["ours"] - losses["reference"])
    if difference > LARGEST_LOSS_DIFFERENCE and not arguments.bf16:
        raise AssertionError(f"The losses differ by {difference:.2e}, more than {LARGEST_LOSS_DIFFERENCE}: {losses}.")
    speeds = {
        "ours": [len(users) / taken for taken in times[0]],
        "reference": [len(sample) / taken for taken in times[1]],
        "reference, projected once": [len(sample) / taken for taken in once],
    }
    ratios = spread([fast / slow for fast, slow in zip(speeds["ours"], speeds["reference"])])
    result = {
        "ratio": ratios["median"],
        "ratios": ratios,
        "ratio_without_projection": float(np.median(speeds["ours"]) / np.median(speeds["reference, projected once"])),
        "users_per_second": {side: spread(values) for side, values in speeds.items()},
        "users": {"ours": len(users), "reference": len(sample)},
        "loss": losses,
        "loss_difference": difference,
        "largest_rank_difference": int(np.abs(ranks - reference_ranks).max()),
        "setting": setting(arguments, model),
    }
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def first_users(sequences: Sequences, users: int) -> Sequences:
    users = min(users, len(sequences))
    return Sequences(
        sequences.user_ids[:users],
        sequences.histories[: sequences.offsets[users]],
        sequences.offsets[: users + 1],
        sequences.targets[:users],
    )


@torch.no_grad()
def our_results(model, sample: list[dict]) -> tuple[float, np.ndarray]:
    """Cross-entropy and ranks of the sampled users' targets, in one batch."""
    targets = torch.tensor([user["target"] for user in sample], device=model.device)
    embeddings, table = model.encode_histories([user["history"] for user in sample]), model.item_table()
    scores = score_items(embeddings, table)
    mask_histories(scores, pad_histories([user["history"] for user in sample], scores.device))
    return float(catalogue_cross_entropy(embeddings, table, targets)), target_ranks(scores, targets).cpu().numpy()


def report(result: dict) -> str:
    total = result["users"]["ours"]
    rows = []
    for side, speeds in result["users_per_second"].items():
        values = [f"{speeds[name]:.1f}" for name in ("minimum", "median", "maximum")]
        users = total if side == "ours" else result["users"]["reference"]
        rows.append([side, *values, users, f"{total / speeds['median']:,.0f}"])
    columns = ["evaluation", "users/s, minimum", "median", "maximum", "users timed", f"seconds for {total:,} users"]
    ratios = result["ratios"]
    return (
        f"{markdown_table(columns, rows)}\n\nRatio {ratios['median']:.1f} ({ratios['minimum']:.1f} to "
        f"{ratios['maximum']:.1f}), {result['ratio_without_projection']:.1f} to a reference that projects the "
        f"catalogue once; the reference's {result['users']['reference']} users are drawn at random and its time is "
        f"scaled. Losses {result['loss_difference']:.1e} apart, ranks by {result['largest_rank_difference']} at most. "
        f"{setting_sentence(result['setting'])}"
    )


if __name__ == "__main__":
    main()

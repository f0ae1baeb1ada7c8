# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
Peak memory of a training step at 10,000 and at 1,000,000 items, less what every item must have: its rows of the
model's tables, their gradients and their optimizer states.

    python examples/benchmarks/memory.py           # Markdown, some minutes and about 14 GiB
    python examples/benchmarks/memory.py --json    # one object: `ratio` of the largest catalogue to the smallest

Each catalogue is measured in a process of its own, on histories as long as those of real users, with items drawn at
random. The tables are the parameters and buffers with one row per item, and the fused table with its gradient.
"""

import argparse
import json

import numpy as np
import torch

from mmesid.trainer.recommender.collators import HistoryCollator
from workload import (
    Workload,
    argument_parser,
    in_subprocess,
    markdown_table,
    peak_memory,
    precision,
    reset_peak_memory,
    seconds,
    setting,
    setting_sentence,
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--items", type=int, nargs="+", default=[10_000, 1_000_000], help="Sizes of the catalogues, smallest first."
    )
    parser.add_argument("--users", type=int, default=16, help="Users in the step.")
    parser.add_argument("--memory_at", type=int, help="Measure one catalogue alone.")
    arguments = parser.parse_args()
    if arguments.memory_at is not None:
        print(json.dumps(measure(arguments)))
        return
    catalogues = {items: in_subprocess("--memory_at", str(items)) for items in arguments.items}
    first, last = (catalogues[items] for items in (arguments.items[0], arguments.items[-1]))
    settings = [measured.pop("setting") for measured in catalogues.values()]
    result = {
        "ratio": last["remaining_bytes"] / first["remaining_bytes"],
        "catalogues": catalogues,
        "setting": settings[-1],
    }
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def measure(arguments: argparse.Namespace) -> dict:
    """Peak memory of the second step, when the optimizer has its states."""
    workload = Workload.load(arguments.data_dir)
    examples = workload.training_users(arguments.max_history, arguments.users, arguments.seed)
    model = workload.new_model(arguments, torch.ones(arguments.memory_at + 1, dtype=torch.long)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = np.random.default_rng(arguments.seed)
    for example in examples:
        items = generator.integers(1, arguments.memory_at + 1, len(example["history"]) + 1)
        example |= {"history": items[:-1], "targets": items[1:]}
    batch = HistoryCollator(arguments.max_history, workload.prompt_ids[1])(examples)
    batch = {name: tensor.to(arguments.device) for name, tensor in batch.items()}

    def step() -> None:
        with precision(arguments):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    reset_peak_memory(arguments.device)
    taken = seconds(step, arguments.device)
    peak = peak_memory(arguments.device)
    tables = table_bytes(model, optimizer, arguments.memory_at + 1)
    return {
        "peak_bytes": peak,
        "table_bytes": tables,
        "remaining_bytes": peak - sum(tables.values()),
        "seconds": taken,
        "setting": setting(arguments, model) | {"rounds": 1},
    }


def table_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: int) -> dict[str, int]:
    """Bytes of what has one row per item, by kind."""
    parameters = [parameter for parameter in model.parameters() if len(parameter) == rows]
    states = [state for parameter in parameters for state in optimizer.state[parameter].values() if state.dim() > 0]
    buffers = [buffer for buffer in model.buffers() if buffer.dim() > 0 and len(buffer) == rows]
    return {
        "parameters": sum(map(_bytes, parameters)),
        "gradients": sum(map(_bytes, parameters)),
        "optimizer_states": sum(map(_bytes, states)),
        "frozen": sum(map(_bytes, buffers)),
        "fused_table_and_gradient": 2 * rows * model.config.hidden_size * 4,
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def report(result: dict) -> str:
    kinds = list(next(iter(result["catalogues"].values()))["table_bytes"])
    rows = [
        [
            f"{items:,}",
            _mebibytes(measured["peak_bytes"]),
            *(_mebibytes(measured["table_bytes"][kind]) for kind in kinds),
            _mebibytes(measured["remaining_bytes"]),
            f"{measured['seconds']:.2f}",
        ]
        for items, measured in result["catalogues"].items()
    ]
    columns = ["items", "peak MiB", *(kind.replace("_", " ") for kind in kinds), "remaining MiB", "seconds"]
    return f"{markdown_table(columns, rows)}\n\nRatio {result['ratio']:.2f}. {setting_sentence(result['setting'])}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f}"


if __name__ == "__main__":
    main()

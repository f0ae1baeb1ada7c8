# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
Time of `recommend` for one user of a large catalogue, against the bare matrix product and top k of the same size.

    python examples/benchmarks/recommend_speed.py           # Markdown, about 8 GiB
    python examples/benchmarks/recommend_speed.py --json    # one object: `ratio` is the median over the rounds

The first call, which makes the item table, is timed apart.
"""

import json

import torch

from workload import (
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
    parser.set_defaults(rounds=20)
    parser.add_argument("--items", type=int, default=1_000_000, help="Size of the catalogue.")
    parser.add_argument("--top_k", type=int, default=10, help="Items to recommend.")
    parser.add_argument("--history_length", type=int, default=9, help="Items in the user's history.")
    arguments = parser.parse_args()
    workload = Workload.load(arguments.data_dir)
    model = workload.new_model(arguments, torch.ones(arguments.items + 1, dtype=torch.long)).eval()
    history = torch.randint(1, arguments.items + 1, (arguments.history_length,)).tolist()
    table = torch.randn(arguments.items + 1, arguments.hidden_size, device=arguments.device)
    user = torch.randn(1, arguments.hidden_size, device=arguments.device)

    def recommend() -> None:
        with precision(arguments):
            model.recommend([history], top_k=arguments.top_k)

    def bare() -> None:
        (user @ table.T).topk(arguments.top_k)

    first = seconds(recommend, arguments.device)
    bare()
    ours, reference = alternate(recommend, bare, arguments.rounds, arguments.device)
    ratios = spread([slow / fast for slow, fast in zip(ours, reference)])
    result = {
        "ratio": ratios["median"],
        "ratios": ratios,
        "milliseconds": {
            "recommend": spread([1000 * taken for taken in ours]),
            "matmul and top k": spread([1000 * taken for taken in reference]),
        },
        "first_call_seconds": first,
        "top_k": arguments.top_k,
        "history_length": len(history),
        "setting": setting(arguments, model),
    }
    print(json.dumps(result, indent=2) if arguments.json else report(result))


def report(result: dict) -> str:
    rows = [
        [name, *(f"{times[key]:.1f}" for key in ("minimum", "median", "maximum"))]
        for name, times in result["milliseconds"].items()
    ]
    ratios = result["ratios"]
    return (
        f"{markdown_table(['one user', 'ms, minimum', 'median', 'maximum'], rows)}\n\nRatio {ratios['median']:.2f} "
        f"({ratios['minimum']:.2f} to {ratios['maximum']:.2f}); the first call took "
        f"{result['first_call_seconds']:.1f} s. {result['history_length']} items in the history, top "
        f"{result['top_k']}. {setting_sentence(result['setting'])}"
    )


if __name__ == "__main__":
    main()

"""
Recommends items to users from their histories of raw item ids.

    mmesid recommend --model_dir runs/quickstart/recommender --history sku000007 sku000031 --top_k 5
    mmesid recommend --model_dir runs/quickstart/recommender --histories_file users.jsonl \
        --output_file recommended.jsonl
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor, SequentialRecommendationPipeline

from ..data.files import on_the_hub, read_lines
from ..running.arguments import CommandArguments, DeviceArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import write_text_atomic


BATCH_SIZE = 1024
# Those of the pipeline.
SETTINGS = ("top_k", "exclude_history", "allowed_items", "denied_items", "return_contributions")


@dataclass(kw_only=True)
class RecommendArguments(CommandArguments, DeviceArguments):
    """
    Recommend items to users, named by the raw ids of the items in their histories.

    Args:
        > Users

        model_dir (`str`): Recommender: a directory written by `mmesid finetune`, or a repository on the Hub.
        history (`list[str]`, *optional*): Item ids of one user, oldest first.
        histories_file (`str`, *optional*): JSON Lines file with one user per line: a list of item ids, oldest first.

        > Recommendations

        top_k (`int`, *optional*, defaults to `10`): Items to recommend to each user.
        exclude_history (`bool`, *optional*, defaults to `True`): Leave out the items of the history.
        allowed_items (`list[str]`, *optional*): Item ids to choose from; all by default.
        denied_items (`list[str]`, *optional*): Item ids that are not recommended.
        return_contributions (`bool`, *optional*, defaults to `False`): Say what each score is the sum of: the ID
            vector and each modality.
        output_file (`str`, *optional*): JSON Lines file to write instead of printing a table.
    """

    model_dir: str
    history: list[str] | None = None
    histories_file: str | None = None
    top_k: int = 10
    exclude_history: bool = True
    allowed_items: list[str] | None = None
    denied_items: list[str] | None = None
    return_contributions: bool = False
    output_file: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("top_k",))
        if bool(self.history) == bool(self.histories_file):
            raise ValueError("Give either --history with item ids or --histories_file with one user per line.")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(RecommendArguments, argv)
    # Before anything else asks for the state of this process.
    device = PartialState(cpu=arguments.use_cpu).device
    histories = read_histories(arguments)
    with loading_from(arguments.model_dir):
        processor = MMESIDProcessor.from_pretrained(arguments.model_dir)
        # Before the weights are loaded: an unknown item ends it.
        processor(histories)
        model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model_dir)
    recommender = SequentialRecommendationPipeline(model=model, processor=processor, device=device)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    users: list = []
    for start in tqdm(range(0, len(histories), BATCH_SIZE), desc="Recommending", unit="batch", delay=2):
        users += recommender(histories[start : start + BATCH_SIZE], batch_size=BATCH_SIZE, **settings)
    if arguments.output_file is None:
        for history, items in zip(histories, users, strict=True):
            print_user(history, items, processor)
        return
    write_text_atomic(arguments.output_file, "".join(json.dumps(user, ensure_ascii=False) + "\n" for user in users))
    print(f"recommend: wrote {len(users)} users to '{arguments.output_file}'")


def print_user(history: list[str], items: list[dict], processor: MMESIDProcessor) -> None:
    """One user's recommendations as a table, below the latest items of the history."""
    latest = history[-3:]
    if processor.titles is not None:
        latest = processor.convert_rows_to_titles(processor.convert_item_ids_to_rows(latest))
    print(f"\nAfter {', '.join(latest)}:")
    width = max(len(item["item_id"]) for item in items)
    for place, item in enumerate(items, start=1):
        parts = ", ".join(f"{name} {part:.4f}" for name, part in item.get("contributions", {}).items())
        title = item["title"] or ""
        print(f"{place:>3}  {item['item_id']:<{width}}  {item['score']:8.4f}  {title}  {parts}".rstrip())


def loading_from(model_dir: str) -> AbstractContextManager:
    """Surrounds the loading of a recommender; raises `FileNotFoundError` if `model_dir` is a directory without one, or
    neither a directory nor a repository that the Hub gives."""
    if not Path(model_dir).is_dir():
        return on_the_hub(model_dir)
    for name in ("config.json", "processor_config.json"):
        if not (Path(model_dir) / name).is_file():
            raise FileNotFoundError(
                f"'{model_dir}' holds no recommender, it lacks '{name}'; name a directory that `mmesid finetune` "
                "wrote."
            )
    return nullcontext()


def read_histories(arguments: RecommendArguments) -> list[list[str]]:
    """Raises `FileNotFoundError` if there is no such file, and `ValueError` if it is empty or not UTF-8, or a line is
    not a list of item ids."""
    if arguments.history is not None:
        return [arguments.history]
    path = Path(arguments.histories_file)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; give a JSON Lines file with a list of item ids per line.")
    histories = []
    for where, line in read_lines(path):
        try:
            history = json.loads(line)
        except json.JSONDecodeError:
            history = None
        if not isinstance(history, list) or not history or not all(isinstance(item_id, str) for item_id in history):
            raise ValueError(f"{where}: expected a non-empty JSON list of item ids in quotes, found '{line[:80]}'.")
        histories.append(history)
    if not histories:
        raise ValueError(f"'{path}' is empty; write one user per line, as a list of item ids.")
    return histories


if __name__ == "__main__":
    run_as_script("recommend", main)

"""
Recommends items to users from their histories of raw item ids.

    mmesid recommend --model_dir runs/quickstart/recommender --history sku000007 sku000031 --top_k 5
    mmesid recommend --model_dir runs/quickstart/recommender --histories_file users.jsonl --output_file
    recommended.jsonl
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor
from modeling_mmesid.recommendation import RecommendationOutput

from ..data.files import on_the_hub, read_lines
from ..running.arguments import CommandArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import write_text_atomic


BATCH_SIZE = 1024


@dataclass(kw_only=True)
class RecommendArguments(CommandArguments):
    """
    Recommend items to users, named by the raw ids of the items in their histories.

    Args:
        > Users

        model_dir (`str`): Recommender: a directory written by `mmesid finetune`, or a repository on the Hub.
        history (`list[str]`, *optional*): Item ids of one user, oldest first.
        histories_file (`str`, *optional*): JSON Lines file with one user a line: a list of item ids, oldest first.

        > Recommendations

        top_k (`int`, *optional*, defaults to `10`): Items to recommend to a user.
        exclude_history (`bool`, *optional*, defaults to `True`): Leave out the items of the history.
        allowed_items (`list[str]`, *optional*): Item ids to choose from; all by default.
        denied_items (`list[str]`, *optional*): Item ids that are not recommended.
        return_contributions (`bool`, *optional*, defaults to `False`): Say what each score is the sum of: the ID
            vector and every modality.
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
        if (self.history is None) == (self.histories_file is None):
            raise ValueError("Give either --history with item ids or --histories_file with one user per line.")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(RecommendArguments, argv)
    histories = read_histories(arguments)
    with loading_from(arguments.model_dir):
        processor = MMESIDProcessor.from_pretrained(arguments.model_dir)
    rows = processor(histories)
    with loading_from(arguments.model_dir):
        model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model_dir)
    allowed, denied = (
        processor.convert_item_ids_to_rows(items) if items is not None else None
        for items in (arguments.allowed_items, arguments.denied_items)
    )
    users = []
    for start in tqdm(
        range(0, len(rows), BATCH_SIZE), desc="Recommending", unit="batch", disable=len(rows) <= BATCH_SIZE
    ):
        output = model.recommend(
            rows[start : start + BATCH_SIZE],
            arguments.top_k,
            arguments.exclude_history,
            allowed_items=allowed,
            denied_items=denied,
            return_contributions=arguments.return_contributions,
            batch_size=BATCH_SIZE,
        )
        users += described(output, processor)
    if arguments.output_file is not None:
        write_text_atomic(
            arguments.output_file, "".join(json.dumps(user, ensure_ascii=False) + "\n" for user in users)
        )
        print(f"recommend: wrote {len(users)} users to '{arguments.output_file}'")
        return
    for history, user in zip(histories, users, strict=True):
        print(
            f"\nAfter {', '.join(processor.convert_rows_to_titles(processor.convert_item_ids_to_rows(history))[-3:])}:"
        )
        width = max(len(item["item_id"]) for item in user)
        for place, item in enumerate(user, start=1):
            parts = ", ".join(f"{name} {part:.4f}" for name, part in item.get("contributions", {}).items())
            print(f"{place:>3}  {item['item_id']:<{width}}  {item['score']:8.4f}  {item['title']}  {parts}".rstrip())


def described(output: RecommendationOutput, processor: MMESIDProcessor) -> list[list[dict]]:
    """A list of items for each user: `item_id`, `title`, `score` and, if asked for, `contributions`."""
    parts = {name: values.tolist() for name, values in (output.contributions or {}).items()}
    ids, titles = processor.convert_rows_to_item_ids(output.items), processor.convert_rows_to_titles(output.items)
    users = [
        [{"item_id": item_id, "title": title, "score": round(score, 6)} for item_id, title, score in zip(*user)]
        for user in zip(ids, titles, output.scores.tolist(), strict=True)
    ]
    for row, user in enumerate(users):
        for place, item in enumerate(user if parts else ()):
            item["contributions"] = {name: round(values[row][place], 6) for name, values in parts.items()}
    return users


def loading_from(model_dir: str) -> AbstractContextManager:
    """
    Surrounds the loading of a recommender.

    Raises:
        FileNotFoundError: If `model_dir` is a directory without a recommender, or neither a directory nor a repository
            that the Hub gives.
    """
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
    """
    Raises:
        ValueError: If the file is empty or not UTF-8, or a line is not a list of item ids.
        FileNotFoundError: If the file does not exist.
    """
    if arguments.history is not None:
        return [arguments.history]
    path = Path(arguments.histories_file)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; give a JSON Lines file with a list of item ids a line.")
    histories = []
    for number, line in read_lines(path):
        try:
            history = json.loads(line)
        except json.JSONDecodeError:
            history = None
        if not isinstance(history, list) or not history or not all(isinstance(item_id, str) for item_id in history):
            raise ValueError(
                f"'{path}', line {number}: expected a non-empty JSON list of item ids in quotes, found '{line[:80]}'."
            )
        histories.append(history)
    if not histories:
        raise ValueError(f"'{path}' is empty; write one user a line, as a list of item ids.")
    return histories


if __name__ == "__main__":
    run_as_script("recommend", main)

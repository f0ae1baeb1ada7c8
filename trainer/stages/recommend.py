"""
Recommends items to users from their histories of raw item ids.

    mmesid recommend --model_dir runs/quickstart/recommender --history sku000007 sku000031 --top_k 5
    mmesid recommend --model_dir runs/quickstart/recommender --prepared_dir runs/quickstart/prepared \
        --output_file recommended.parquet
    mmesid recommend --model_dir runs/quickstart/recommender --histories_file users.jsonl --on_unknown skip --json
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from tqdm.auto import tqdm

from mmesid.hub_cards.names import printable
from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor, SequentialRecommendationPipeline

from ..data.histories import Histories, known_histories, prepared_users, read_histories
from ..data.prepared import PreparedDataset
from ..recommender.loading import loading_from
from ..running.arguments import CommandArguments, DeviceArguments, JsonArguments, check_ranges, parse
from ..running.errors import run_as_script


# Of the pipeline.
SETTINGS = ("top_k", "exclude_history", "allowed_items", "denied_items", "return_contributions")
SUFFIXES = (".jsonl", ".parquet")
# Users whose recommendations are written at a time.
USERS_AT_ONCE = 4096


@dataclass(kw_only=True)
class RecommendArguments(CommandArguments, DeviceArguments, JsonArguments):
    """
    Recommend items to users, named by the raw ids of the items in their histories.

    Args:
        > Users

        model_dir (`str`): Recommender: a directory written by `mmesid finetune`, or a repository on the Hub.
        history (`list[str]`, *optional*): Item ids of one user, oldest first.
        histories_file (`str`, *optional*): File with many users: JSON Lines (.jsonl, .gz if gzipped) with a list of
            item ids per line, oldest first, or {"user_id": ..., "history": [...]}; or Parquet with a column history
            and, if users have ids, user_id.
        prepared_dir (`str`, *optional*): Directory written by `mmesid prepare`, whose users all get what comes after
            their last item.
        on_unknown (`str`, *optional*, defaults to `"error"`): What to do with an item that the model does not know:
            stop, naming file and line, or skip it. A user none of whose items is known gets no recommendations.

        > Recommendations

        top_k (`int`, *optional*, defaults to `10`): Items to recommend to each user.
        exclude_history (`bool`, *optional*, defaults to `True`): Leave out the items of the history.
        allowed_items (`list[str]`, *optional*): Item ids to choose from; all by default.
        denied_items (`list[str]`, *optional*): Item ids that are not recommended.
        return_contributions (`bool`, *optional*, defaults to `False`): Say what each score is the sum of: the ID
            vector, each modality, and the scores beside the decoder's, such as text_similarity and sasrec.
        output_file (`str`, *optional*): File to write instead of printing tables: JSON Lines (.jsonl) or Parquet
            (.parquet) with user_id and recommendations of every user, in the order of the input.

        > Computation

        per_device_eval_batch_size (`int`, *optional*, defaults to `256`): Users that a device ranks at a time.
    """

    model_dir: str
    history: list[str] | None = None
    histories_file: str | None = None
    prepared_dir: str | None = None
    on_unknown: Literal["error", "skip"] = "error"
    top_k: int = 10
    exclude_history: bool = True
    allowed_items: list[str] | None = None
    denied_items: list[str] | None = None
    return_contributions: bool = False
    output_file: str | None = None
    per_device_eval_batch_size: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("top_k", "per_device_eval_batch_size"))
        if sum(map(bool, (self.history, self.histories_file, self.prepared_dir))) != 1:
            raise ValueError(
                "Give either --history with item ids, --histories_file with many users, or --prepared_dir for the "
                "users of a prepared dataset."
            )
        if self.output_file is not None and Path(self.output_file).suffix not in SUFFIXES:
            raise ValueError(
                f"--output_file {self.output_file} has a suffix that is not written; call it {' or '.join(SUFFIXES)}."
            )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(RecommendArguments, argv)
    # Before anything else asks for the state of this process.
    device = PartialState(cpu=arguments.use_cpu).device
    with loading_from(arguments.model_dir):
        processor = MMESIDProcessor.from_pretrained(arguments.model_dir)
        # Before the weights are loaded: an unknown item ends it.
        histories = asked_histories(arguments, processor)
        model = MMESIDForSequentialRecommendation.from_pretrained(arguments.model_dir)
    recommender = SequentialRecommendationPipeline(model=model, processor=processor, device=device)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings["batch_size"] = arguments.per_device_eval_batch_size
    sources = model.source_names if arguments.return_contributions else []
    with (
        output(arguments, processor, sources) as write,
        tqdm(total=len(histories), desc="Recommending", unit=" users", delay=2) as progress,
    ):
        for start in range(0, len(histories), USERS_AT_ONCE):
            some = range(start, min(start + USERS_AT_ONCE, len(histories)))
            users = recommended(recommender, histories, some, settings)
            write(users, histories.rows[start : start + len(users)])
            progress.update(len(users))
    if arguments.output_file is not None:
        report(arguments, histories)


def asked_histories(arguments: RecommendArguments, processor: MMESIDProcessor) -> Histories:
    """The histories that the arguments name, as rows of the model."""
    if arguments.history:
        users = iter([("--history", None, arguments.history)])
    elif arguments.histories_file:
        users = read_histories(arguments.histories_file)
    else:
        users = prepared_users(PreparedDataset.load(arguments.prepared_dir))
    return known_histories(users, processor.item_ids, arguments.on_unknown)


def recommended(
    recommender: SequentialRecommendationPipeline, histories: Histories, users: range, settings: dict
) -> list[dict]:
    """`user_id` and `recommendations`, as the pipeline gives them, of some of the users; none where no item of a user
    is known."""
    processor = recommender.processor
    asked = [user for user in users if len(histories.rows[user])]
    item_ids = [processor.convert_rows_to_item_ids(histories.rows[user].tolist()) for user in asked]
    items = recommender(item_ids, **settings)
    by_user = dict(zip(asked, items, strict=True))
    return [{"user_id": histories.user_ids[user], "recommendations": by_user.get(user, [])} for user in users]


Write = Callable[[list[dict], list[np.ndarray]], None]


@contextmanager
def output(arguments: RecommendArguments, processor: MMESIDProcessor, sources: list[str]) -> Iterator[Write]:
    """Gives what takes the users and their rows, some at a time: it prints them, or writes a file that is put in place
    when all of them are written. `sources` are the names of the contributions, if there are to be any."""
    if arguments.output_file is None:
        yield _print_json if arguments.json else partial(print_users, processor=processor)
        return
    path = Path(arguments.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".parquet":
            schema = parquet_schema(sources)
            with pq.ParquetWriter(partial_file, schema) as writer:
                yield lambda users, _: writer.write_table(pa.Table.from_pylist(users, schema))
        else:
            with open(partial_file, "w", encoding="utf-8") as file:
                yield partial(_print_json, file=file)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def parquet_schema(sources: list[str]) -> pa.Schema:
    item = {"item_id": pa.string(), "title": pa.string(), "score": pa.float32()}
    if sources:
        item["contributions"] = pa.struct(dict.fromkeys(sources, pa.float32()))
    return pa.schema({"user_id": pa.string(), "recommendations": pa.list_(pa.struct(item))})


def _print_json(users: list[dict], rows: list[np.ndarray], file: TextIO | None = None) -> None:
    for user in users:
        print(json.dumps(user, ensure_ascii=False), file=file)


def print_users(users: list[dict], rows: list[np.ndarray], processor: MMESIDProcessor) -> None:
    """The recommendations of each user as a table, below the latest items of the history."""
    show = processor.convert_rows_to_item_ids if processor.titles is None else processor.convert_rows_to_titles
    for user, history in zip(users, rows, strict=True):
        name = "After" if user["user_id"] is None else f"{printable(user['user_id'])}, after"
        print(f"\n{name} {', '.join(map(printable, show(history[-3:].tolist()))) or 'nothing that is known'}:")
        items = user["recommendations"]
        width = max((len(item["item_id"]) for item in items), default=0)
        for place, item in enumerate(items, start=1):
            parts = ", ".join(f"{name} {part:.4f}" for name, part in item.get("contributions", {}).items())
            item_id, title = printable(item["item_id"]), printable(item["title"] or "")
            print(f"{place:>3}  {item_id:<{width}}  {item['score']:8.4f}  {title}  {parts}".rstrip())


def report(arguments: RecommendArguments, histories: Histories) -> None:
    """Says what was written, and of which items nothing is known."""
    without = sum(len(rows) == 0 for rows in histories.rows)
    if arguments.json:
        counts = {"users": len(histories), "users_without_recommendations": without}
        unknown = {"unknown_items": len(histories.unknown)}
        print(json.dumps({"output_file": arguments.output_file} | counts | unknown))
        return
    print(f"recommend: wrote {len(histories):,} users to '{arguments.output_file}'")
    if histories.unknown:
        first = ", ".join(f"'{printable(item_id)}'" for item_id in list(histories.unknown)[:3])
        places = sum(histories.unknown.values())
        print(
            f"recommend: unknown items that were left out: {len(histories.unknown):,}, in {places:,} places, the "
            f"first {first}; users without any known item, who get no recommendations: {without:,}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_as_script("recommend", main)

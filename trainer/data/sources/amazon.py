"""
Readers of the three generations of Amazon reviews, from the files as they are published:

    2014    reviews_Beauty_5.json.gz        meta_Beauty.json.gz         the latter's lines are Python literals
    2018    All_Beauty_5.json.gz            meta_All_Beauty.json.gz     JSON, with the markup of the shop's pages
    2023    All_Beauty.jsonl[.gz]           meta_All_Beauty.jsonl[.gz]  JSON; ratings alone also as CSV, some metadata
                                                                        as Parquet

(J. McAuley et al., 2015; J. Ni et al., 2019; Y. Hou et al., 2024.) Only items with reviews become part of the
catalogue: the metadata list many more.

Those of 2023 are also a dataset of the Hub, whose configurations are read through `datasets`, as are folders and other
repositories with the fields of these files.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import BadRows, one_line, parse_json, raw_id, read_lines, require
from ..source import CatalogueBuilder, InteractionCollector, Source, join
from ..table_files import TableLocation, file_of_known_format, parquet_batches, readable
from ..texts import is_missing, plain_text
from .tabular import InteractionColumns, read_interactions


REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"

# The configurations that the card of the repository names: the file that its loading script reads for each, and the
# reader of `datasets` for it. Metadata are lines of text to `datasets`, for `details` differ from item to item, as no
# column of a table may. In CSV it would take an id of digits for a number.
_CONFIGURATIONS = {
    "interactions": (
        (r"raw_review_(\w+)", r"raw/review_categories/\1.jsonl", "json"),
        (r"([05]core)_rating_only_(\w+)", r"benchmark/\1/rating_only/\2.csv", None),
    ),
    "items": ((r"raw_meta_(\w+)", r"raw/meta_categories/meta_\1.jsonl", "text"),),
}

_ITEMS_AT_ONCE = 1024


@dataclass(frozen=True)
class Generation:
    """
    Args:
        name (`str`): What the data are called.
        columns (`InteractionColumns`): What a review calls its user, item, time and rating; metadata call an item's id
            alike.
        features (`str`): The field of metadata with the item's features.
        brand, categories, image (`Callable[[dict], Any]`): From a line of metadata, without what is missing, to the
            item's brand, its categories and the URL of its picture, or anything else where the line is damaged.
    """

    name: str
    columns: InteractionColumns
    features: str
    brand: Callable[[dict], Any]
    categories: Callable[[dict], Any]
    image: Callable[[dict], Any]


def file_of(location: TableLocation, kind: str) -> TableLocation:
    """
    The file of a configuration of `"interactions"` or `"items"` where the location is the Hub's dataset of 2023, the
    location itself where it is not: `datasets` runs no loading scripts, and loads nothing by name from a repository
    that has one. Raises `ValueError` if there is no such configuration, or it is more than one file.
    """
    if location.path != REPOSITORY:
        return location
    for pattern, file, reader in _CONFIGURATIONS[kind]:
        if match := re.fullmatch(pattern, location.config or ""):
            repository = REPOSITORY if location.revision is None else f"{REPOSITORY}@{location.revision}"
            return TableLocation(f"hf://datasets/{repository}/{match.expand(file)}", reader=reader)
    raise ValueError(
        f"'{REPOSITORY}' is read by the interactions' configurations raw_review_<category>, "
        "0core_rating_only_<category> and 5core_rating_only_<category>, and the items' raw_meta_<category>; the "
        f"configuration of {kind} is {location.config!r}; name one of them, as {REPOSITORY}:raw_meta_<category>, or "
        f"a file, as hf://datasets/{REPOSITORY}/<file>."
    )


def read_amazon(
    generation: Generation,
    interactions: TableLocation,
    items: TableLocation,
    *,
    text_fields: list[str] | None = None,
    on_bad_row: str = "error",
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """Reads reviews and metadata. `text_fields` may name further fields of the metadata (`details` of 2023); the
    others are those of [`~mmesid.trainer.data.sources.tabular.read_tabular`]."""
    bad_rows = BadRows(on_bad_row)
    name = source_name or f"{generation.name}, {interactions.config or Path(interactions.path).name.split('.')[0]}"
    collector = InteractionCollector()
    read_interactions(interactions, generation.columns, collector, bad_rows)
    collector.finish()

    builder = CatalogueBuilder(text_fields, pictures, Path())
    id_field = generation.columns.item_id
    for where, line in _metadata(items):
        try:
            item = _parse(line, where) if isinstance(line, str) else line
            require(item, [id_field], where)
            item_id = raw_id(item[id_field], id_field, where)
            # The metadata of 2018 repeat lines.
            if item_id in collector.item_positions and item_id not in builder.positions:
                present = {field: value for field, value in item.items() if not is_missing(value)}
                values = {field: _plain(present.get(field)) for field in text_fields or ()}
                image = generation.image(present)
                builder.append(
                    item_id, values | _fields(present, generation), image if isinstance(image, str) else None, where
                )
        except ValueError as error:
            bad_rows.refuse("items", error)
    return join(name, licence, collector, builder, items.path, bad_rows)


def _metadata(location: TableLocation) -> Iterator[tuple[str, str | dict]]:
    """What errors call every item, and its line or its fields."""
    table = location.load(streaming=True)
    if table is not None:
        with readable(location.path):
            for number, row in enumerate(tqdm(table, desc=Path(location.path).name, unit=" rows", delay=2), start=1):
                yield f"'{location.path}', line {number}", row["text"] if location.reader == "text" else row
        return
    path, kind = file_of_known_format(location)
    if kind == "lines":
        yield from read_lines(path)
    elif kind == "parquet":
        # The repository of 2023 has some categories as Parquet too.
        rows = (row for batch in parquet_batches(path, _ITEMS_AT_ONCE) for row in batch.to_pylist())
        yield from ((f"'{path}', line {number}", row) for number, row in enumerate(rows, start=1))
    else:
        raise ValueError(
            f"'{path}' is a table of text, which cannot hold the lists of Amazon's metadata; write it as JSON "
            "lines or Parquet, with Dataset.to_json or Dataset.to_parquet."
        )


def _parse(line: str, where: str) -> dict:
    """A line of metadata, which is JSON, or, in 2014, a Python literal."""
    if not line.startswith("{'"):
        return parse_json(line, where)
    try:
        value = ast.literal_eval(line)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{where} is neither JSON nor a Python literal ({one_line(error)}); download the file again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, not the fields of an item; download the file again.")
    return value


def _fields(item: dict, generation: Generation) -> dict:
    """The fields of a line of metadata, without markup. What is of another type than it should be is missing."""
    title, description = _plain(item.get("title")), _plain(item.get("description"))
    categories = _plain(generation.categories(item))
    return {
        # A title with this call is a script of the page that the crawler of 2018 took for one.
        "title": None if isinstance(title, str) and "getTime" in title else title,
        # A string, or a list of paragraphs.
        "description": " ".join(description) if isinstance(description, list) else description,
        "features": _plain(item.get(generation.features)),
        "brand": _plain(generation.brand(item)),
        "categories": list(dict.fromkeys(categories if isinstance(categories, list) else [categories])),
        "price": item.get("price"),
    }


def _plain(value):
    """A field of metadata without markup: a string, a number, or the non-empty strings of a list or of a mapping."""
    if isinstance(value, dict):
        value = [
            f"{name}: {text}" for name, text in value.items() if isinstance(text, str | int | float) and text != ""
        ]
    if isinstance(value, list):
        return [text for element in value if isinstance(element, str) and (text := plain_text(element))]
    return plain_text(value) if isinstance(value, str) else value if isinstance(value, int | float) else None


def _field(name: str, default=None) -> Callable[[dict], Any]:
    return lambda item: item.get(name, default)


def _categories_2014(item: dict) -> list:
    # Paths from the root of the shop, which share their first steps.
    paths = item.get("categories")
    paths = paths if isinstance(paths, list) else [paths]
    return [step for path in paths for step in (path if isinstance(path, list) else [path])]


def _image_2018(item: dict) -> Any:
    # `image` in the first release of the metadata; `imageURL` are thumbnails of 40 pixels.
    images = item.get("imageURLHighRes") or item.get("image") or item.get("imageURL") or [None]
    return images[0] if isinstance(images, list) else images


def _details(item: dict) -> dict:
    details = item.get("details")
    if isinstance(details, str):
        # JSON inside of the Parquet files.
        try:
            details = json.loads(details)
        except (ValueError, RecursionError):
            details = None
    return details if isinstance(details, dict) else {}


def _brand_2023(item: dict) -> Any:
    return _details(item).get("Brand") or item.get("store")


def _categories_2023(item: dict) -> Any:
    return item.get("categories") or [item.get("main_category")]


def _image_2023(item: dict) -> Any:
    images = item.get("images")
    # The Parquet files of the repository have one list per size where the raw ones have a list of pictures.
    if isinstance(images, dict) and all(isinstance(sizes, list) for sizes in images.values()):
        images = [dict(zip(images, sizes)) for sizes in zip(*images.values())]
    pictures = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    if not pictures:
        return None
    main = next((image for image in pictures if image.get("variant") == "MAIN"), pictures[0])
    return main.get("large") or main.get("hi_res") or main.get("thumb")


_BY_REVIEWER = InteractionColumns("reviewerID", "asin", "unixReviewTime", "overall", fixed=True)
_BY_USER = InteractionColumns("user_id", "parent_asin", "timestamp", "rating", fixed=True)
_GENERATIONS = (
    Generation("Amazon 2014", _BY_REVIEWER, "feature", _field("brand"), _categories_2014, _field("imUrl")),
    Generation("Amazon 2018", _BY_REVIEWER, "feature", _field("brand"), _field("category", []), _image_2018),
    Generation("Amazon 2023", _BY_USER, "features", _brand_2023, _categories_2023, _image_2023),
)
read_amazon_2014, read_amazon_2018, read_amazon_2023 = (partial(read_amazon, one) for one in _GENERATIONS)

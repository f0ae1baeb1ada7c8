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

from tqdm.auto import tqdm

from ..files import line_of, local_file, parse_json, raw_id, read_lines, require
from ..source import CatalogueBuilder, InteractionCollector, Source, join
from ..table_files import TableLocation, is_line_file, parquet_batches, readable
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
        columns (`InteractionColumns`): What a review calls its user, item, time and rating.
        item_id (`str`): What the metadata call an item's id.
        fields (`Callable[[dict], dict]`): From a line of metadata to the fields of an item.
        image (`Callable[[dict], str | None]`): From a line of metadata to the URL of the item's picture.
    """

    name: str
    columns: InteractionColumns
    item_id: str
    fields: Callable[[dict], dict]
    image: Callable[[dict], str | None]


def file_of(location: TableLocation, kind: str) -> TableLocation:
    """
    The file of a configuration where the location is the Hub's dataset of 2023, the location itself where it is not:
    `datasets` runs no loading scripts, and loads nothing by name from a repository that has one.

    Args:
        location (`TableLocation`): With the configuration `raw_review_All_Beauty`, for example.
        kind (`str`): `"interactions"` or `"items"`.

    Raises:
        ValueError: If there is no such configuration of the interactions or the items, or it is more than one file.
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
    pictures: dict[str, Path] | None = None,
    source_name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        generation (`Generation`): How the files are laid out.
        interactions (`TableLocation`): The reviews.
        items (`TableLocation`): The metadata.
        text_fields (`list[str]`, *optional*): Fields that an item's text is made of: title, description, brand,
            categories, price, and others of a line of metadata by its own names (`features` of 2023).
        pictures (`dict[str, Path]`, *optional*): See [`CatalogueBuilder`].
        source_name (`str`, *optional*, defaults to the generation and the name of the configuration or file): What the
            data are called.
        licence (`str`, *optional*, defaults to `"unknown"`): Their terms of use.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line cannot be read; the sentence names file and line.
    """
    name = source_name or f"{generation.name}, {interactions.config or Path(interactions.path).name.split('.')[0]}"
    collector = InteractionCollector()
    if interactions.is_file() and interactions.reader is None and is_line_file(Path(interactions.path)):
        collector.extend_rows(_reviews(local_file(interactions.path), generation.columns))
    else:
        read_interactions(interactions, generation.columns, collector)
    collector.finish()

    builder = CatalogueBuilder(text_fields, pictures)
    metadata = Path(items.path)
    for number, item in _metadata(items):
        require(item, [generation.item_id], metadata, number)
        item_id = raw_id(item[generation.item_id], generation.item_id, metadata, number)
        # The metadata of 2018 repeat lines.
        if item_id in collector.item_positions and item_id not in builder.positions:
            item = {field: value for field, value in item.items() if not is_missing(value)}
            values = {field: _plain(item.get(field)) for field in text_fields or ()} | generation.fields(item)
            builder.append(item_id, values, generation.image(item), line_of(metadata, number))
    return join(name, licence, collector, builder, items.path)


def _metadata(location: TableLocation) -> Iterator[tuple[int, dict]]:
    table = location.load(streaming=True)
    if table is not None:
        with readable(location.path):
            for number, row in enumerate(tqdm(table, desc=Path(location.path).name, unit=" rows", delay=2), start=1):
                yield number, _parse(row["text"], Path(location.path), number) if location.reader == "text" else row
        return
    path = local_file(location.path)
    if is_line_file(path):
        for number, line in read_lines(path):
            yield number, _parse(line, path, number)
    else:
        # The repository of 2023 has some categories as Parquet too.
        batches = parquet_batches(path, _ITEMS_AT_ONCE)
        yield from enumerate((item for batch in batches for item in batch.to_pylist()), start=1)


def _parse(line: str, path: Path, number: int) -> dict:
    """A line that is JSON, or, in 2014, a Python literal."""
    if line.startswith("{'"):
        try:
            return ast.literal_eval(line)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(
                f"{line_of(path, number)} is neither JSON nor a Python literal ({error}); download the file again."
            ) from error
    return parse_json(line, path, number)


def _reviews(path: Path, columns: InteractionColumns) -> Iterator[tuple[str, str, int, float | None]]:
    names = columns.names
    for number, line in read_lines(path):
        review = _parse(line, path, number)
        require(review, names, path, number)
        user, item, time, rating = (review[name] for name in names)
        if not isinstance(time, int) or not isinstance(rating, int | float):
            raise ValueError(
                f"{line_of(path, number)} has {columns.timestamp}={time!r} and {columns.rating}={rating!r}; they must "
                "be an integer and a number."
            )
        yield raw_id(user, columns.user_id, path, number), raw_id(item, columns.item_id, path, number), time, rating


def _plain(value):
    """A field of metadata without markup: a string, or the non-empty strings of a list."""
    if isinstance(value, list):
        return [text for element in value if isinstance(element, str) and (text := plain_text(element))]
    return plain_text(value) if isinstance(value, str) else value if isinstance(value, int | float) else None


def _paragraphs(value) -> str:
    """A description, which is a string or a list of paragraphs."""
    plain = _plain(value)
    return " ".join(plain) if isinstance(plain, list) else plain


def _unique(categories: list[str]) -> list[str]:
    return list(dict.fromkeys(categories))


def _fields_2014(item: dict) -> dict:
    return {
        "title": _plain(item.get("title")),
        "description": _paragraphs(item.get("description")),
        "brand": _plain(item.get("brand")),
        # Paths from the root of the shop, which share their first steps.
        "categories": _unique([step for path in item.get("categories") or [] for step in _plain(path)]),
        "price": item.get("price"),
    }


def _fields_2018(item: dict) -> dict:
    title = item.get("title")
    return {
        # A title with this call is a script of the page that the crawler took for one.
        "title": None if title is None or "getTime" in title else plain_text(title),
        "description": _paragraphs(item.get("description")),
        "brand": _plain(item.get("brand")),
        "categories": _unique(_plain(item.get("category") or [])),
        "price": item.get("price"),
    }


def _fields_2023(item: dict) -> dict:
    details = item.get("details") or {}
    # JSON inside of the Parquet files.
    if isinstance(details, str):
        details = json.loads(details)
    return {
        "title": _plain(item.get("title")),
        "description": _paragraphs(item.get("description")),
        "brand": _plain(details.get("Brand") or item.get("store")),
        "categories": _unique(_plain(item.get("categories") or []) or _plain([item.get("main_category")])),
        "price": item.get("price"),
    }


def _image_2014(item: dict) -> str | None:
    return item.get("imUrl")


def _image_2018(item: dict) -> str | None:
    # `image` in the first release of the metadata; `imageURL` are thumbnails of 40 pixels.
    images = item.get("imageURLHighRes") or item.get("image") or item.get("imageURL") or [None]
    return images[0] if isinstance(images, list) else images


def _image_2023(item: dict) -> str | None:
    images = item.get("images") or []
    # The Parquet files of the repository have one list per size where the raw ones have a list of pictures.
    if isinstance(images, dict):
        images = [dict(zip(images, sizes)) for sizes in zip(*images.values())]
    main = next((image for image in images if image.get("variant") == "MAIN"), images[0] if images else {})
    return main.get("large") or main.get("hi_res") or main.get("thumb")


_BY_REVIEWER = InteractionColumns("reviewerID", "asin", "unixReviewTime", "overall", fixed=True)
AMAZON_2014 = Generation("Amazon 2014", _BY_REVIEWER, "asin", _fields_2014, _image_2014)
AMAZON_2018 = Generation("Amazon 2018", _BY_REVIEWER, "asin", _fields_2018, _image_2018)
AMAZON_2023 = Generation(
    "Amazon 2023",
    InteractionColumns("user_id", "parent_asin", "timestamp", "rating", fixed=True),
    "parent_asin",
    _fields_2023,
    _image_2023,
)

read_amazon_2014 = partial(read_amazon, AMAZON_2014)
read_amazon_2018 = partial(read_amazon, AMAZON_2018)
read_amazon_2023 = partial(read_amazon, AMAZON_2023)

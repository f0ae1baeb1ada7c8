"""
Readers of the three generations of Amazon reviews, from the files as they are published:

    2014    reviews_Beauty_5.json.gz        meta_Beauty.json.gz         the latter's lines are Python literals
    2018    All_Beauty_5.json.gz            meta_All_Beauty.json.gz     JSON, with the markup of the shop's pages
    2023    All_Beauty.jsonl[.gz]           meta_All_Beauty.jsonl[.gz]  JSON; ratings alone also as CSV, some metadata
                                                                        as Parquet

(J. McAuley et al., 2015; J. Ni et al., 2019; Y. Hou et al., 2024.) Only items with reviews become part of the
catalogue: the metadata list many more.
"""

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import local_file, parse_json, place, raw_id, read_lines, require
from .source import CatalogueBuilder, InteractionCollector, Source, join
from .tabular import InteractionColumns, TableLocation, is_line_file, parquet_batches, read_interactions
from .texts import is_missing, plain_text


_ITEMS_AT_ONCE = 1024


@dataclass(frozen=True)
class Generation:
    """
    Args:
        columns (`InteractionColumns`): What a review calls its user, item, time and rating.
        item_id (`str`): What the metadata call an item's id.
        fields (`Callable[[dict], dict]`): From a line of metadata to the fields of an item.
        image (`Callable[[dict], str | None]`): From a line of metadata to the URL of the item's picture.
    """

    columns: InteractionColumns
    item_id: str
    fields: Callable[[dict], dict]
    image: Callable[[dict], str | None]


def read_amazon(
    year: int,
    interactions: str,
    items: str,
    text_fields: list[str] | None = None,
    name: str | None = None,
    licence: str = "unknown",
) -> Source:
    """
    Args:
        year (`int`): The generation: 2014, 2018 or 2023.
        interactions (`str`): The file of reviews; a path, or `hf://datasets/McAuley-Lab/Amazon-Reviews-2023/raw/...`.
        items (`str`): The file of metadata; a path or an address like that.
        text_fields (`list[str]`, *optional*): Fields that an item's text is made of: title, description, brand,
            categories, price, and others of a line of metadata by its own names (`features` of 2023).
        name (`str`, *optional*, defaults to the generation and the name of the file): What the data are called.
        licence (`str`, *optional*, defaults to `"unknown"`): Their terms of use.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line cannot be read; the sentence names file and line.
    """
    generation = GENERATIONS[year]
    reviews, metadata = local_file(interactions), local_file(items)
    collector = InteractionCollector()
    if is_line_file(reviews):
        collector.extend_rows(_reviews(reviews, generation.columns))
    else:
        read_interactions(TableLocation(str(reviews)), generation.columns, collector)
    collector.finish()

    builder = CatalogueBuilder(text_fields)
    for number, item in _metadata(metadata):
        require(item, [generation.item_id], metadata, number)
        item_id = raw_id(item[generation.item_id], generation.item_id, metadata, number)
        # The metadata of 2018 repeat lines.
        if item_id in collector.item_positions and item_id not in builder.positions:
            item = {field: value for field, value in item.items() if not is_missing(value)}
            values = {field: _plain(item.get(field)) for field in text_fields or ()} | generation.fields(item)
            builder.append(item_id, values, generation.image(item), place(metadata, number))
    return join(name or f"Amazon {year}, {reviews.name.split('.')[0]}", licence, collector, builder, str(metadata))


def _metadata(path: Path) -> Iterator[tuple[int, dict]]:
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
                f"{place(path, number)} is neither JSON nor a Python literal ({error}); download the file again."
            ) from error
    return parse_json(line, path, number)


def _reviews(path: Path, columns: InteractionColumns) -> Iterator[tuple[str, str, int, float | None]]:
    names = [columns.user, columns.item, columns.time, columns.rating]
    for number, line in read_lines(path):
        review = _parse(line, path, number)
        require(review, names, path, number)
        user, item, time, rating = (review[name] for name in names)
        if not isinstance(time, int) or not isinstance(rating, int | float):
            raise ValueError(
                f"{place(path, number)} has {columns.time}={time!r} and {columns.rating}={rating!r}; they must be an "
                "integer and a number."
            )
        yield raw_id(user, columns.user, path, number), raw_id(item, columns.item, path, number), time, rating


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
    # The Parquet files of the repository have a list a size where the raw ones have a list of pictures.
    if isinstance(images, dict):
        images = [dict(zip(images, sizes)) for sizes in zip(*images.values())]
    main = next((image for image in images if image.get("variant") == "MAIN"), images[0] if images else {})
    return main.get("large") or main.get("hi_res") or main.get("thumb")


_BY_REVIEWER = InteractionColumns("reviewerID", "asin", "unixReviewTime", "overall")
GENERATIONS = {
    2014: Generation(_BY_REVIEWER, "asin", _fields_2014, _image_2014),
    2018: Generation(_BY_REVIEWER, "asin", _fields_2018, _image_2018),
    2023: Generation(
        InteractionColumns("user_id", "parent_asin", "timestamp", "rating"), "parent_asin", _fields_2023, _image_2023
    ),
}

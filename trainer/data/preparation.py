"""From raw interactions and items to a prepared dataset: in memory, or out of a source that a stage has read."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from .files import one_line
from .images import BadImageError, fetch_images, read_image, resolved
from .prepared import ITEM_FEATURES, PreparedDataset, Sequences, rows_at_once
from .sequences import SPLITS, SequenceSettings, UserSequences, build_sequences
from .source import Catalogue, Source
from .sources.tabular import read_tabular
from .table_files import TableLocation


ON_BAD_IMAGE = ("error", "missing")
# ISO 639: what the Hub knows languages by.
_LANGUAGE = re.compile("[a-z]{2,3}")


def prepare(
    interactions: pd.DataFrame | datasets.Dataset,
    items: pd.DataFrame | datasets.Dataset | None = None,
    *,
    columns: dict[str, str | None] | None = None,
    item_fields: dict[str, str] | None = None,
    text_fields: list[str] | None = None,
    time_format: str | None = None,
    on_bad_row: str = "error",
    on_bad_image: str = "error",
    source_name: str = "interactions",
    licence: str = "unknown",
    language: str | None = None,
    **settings,
) -> PreparedDataset:
    """
    Turns a table of interactions, and one of items, into the dataset that models are trained on and evaluated with.
    Everything stays in memory; [`PreparedDataset.save`] writes it.

    Args:
        interactions (`pandas.DataFrame` or `datasets.Dataset`): One row per interaction of a user with an item.
        items (`pandas.DataFrame` or `datasets.Dataset`, *optional*): One row per item. Without it, and where it lacks
            an item of the interactions, items have nothing but their ids.
        columns (`dict[str, str]`, *optional*): What columns of the interactions are called, `{"user_id": "buyer"}` for
            example. `"user_id"` and `"item_id"` are integers or strings, `"timestamp"` is a number, a timestamp or ISO
            8601 (`None` takes the order of the rows); each has its own name by default. There is no `"rating"` unless
            its column is named.
        item_fields (`dict[str, str]`, *optional*): What columns of the items are called: `"item_id"` (by default as in
            the interactions), `"title"`, `"description"`, `"brand"`, `"categories"` (a list, or a string with `|`
            between them), `"price"` and `"image"` (`datasets.Image`, the bytes of an image file, or the path of one;
            pictures behind URLs count as missing). All but the id may be absent under these names.
        text_fields (`list[str]`, *optional*): Columns that an item's text is made of, in order; by default those that
            are there of title, attributes, genres, brand, categories, features and description.
        time_format (`str`, *optional*): How times are written that are neither numbers nor ISO 8601, in the codes of
            `datetime.strptime`.
        on_bad_row (`str`, *optional*, defaults to `"error"`): Whether a row that cannot be read, repeats an item or
            has a time far from all others is an `"error"`, or is left out and counted (`"skip"`).
        on_bad_image (`str`, *optional*, defaults to `"error"`): Whether a picture that cannot be read is an `"error"`
            or counts as `"missing"`.
        source_name (`str`, *optional*, defaults to `"interactions"`): What the data are called on cards.
        licence (`str`, *optional*, defaults to `"unknown"`): Terms under which the data may be used.
        language (`str`, *optional*): Language of titles and texts, for cards: a code of ISO 639, such as `"en"`.
        **settings: Filters (`min_rating`, `duplicates`, `repeats`, `min_interactions`) and split (`split`,
            `validation_fraction`, `test_fraction`), as [`SequenceSettings`] takes them.

    Returns:
        [`PreparedDataset`]

    Raises:
        ValueError: If an argument is none of its choices, a column is missing, or a value cannot be read.

    Example:

    ```python
    >>> import mmesid
    >>> data = mmesid.prepare(orders, products, columns={"user_id": "customer"}, min_interactions=5)
    >>> data.num_items, len(data.sequences("test"))
    ```
    """
    sequence_settings = SequenceSettings(**settings)
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image is {on_bad_image!r}; choose one of {', '.join(ON_BAD_IMAGE)}.")
    source = read_tabular(
        in_memory(interactions, "interactions"),
        None if items is None else in_memory(items, "items"),
        columns=columns,
        item_fields=item_fields,
        text_fields=text_fields,
        time_format=time_format,
        on_bad_row=on_bad_row,
        source_name=source_name,
        licence=licence,
    )
    return prepare_source(source, sequence_settings, on_bad_image, language=language)


def check_language(language: str | None) -> None:
    """Raises `ValueError` if a language is not named by its code."""
    if language is not None and not _LANGUAGE.fullmatch(language):
        raise ValueError(f"language is {language!r}; give its code of two or three letters (ISO 639), such as en.")


def in_memory(data: pd.DataFrame | datasets.Dataset, name: str) -> TableLocation:
    """A table that is in memory, as readers take tables; raises `ValueError` if it is none."""
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(f"{name} holds the splits {', '.join(data)}; pass one of them, for example {name}['train'].")
    if isinstance(data, pd.DataFrame):
        try:
            data = datasets.Dataset.from_pandas(data, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read as a table ({one_line(error)}); give every column values of one type."
            ) from error
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"{name} is a {type(data).__name__}; pass a pandas.DataFrame or a datasets.Dataset.")
    return TableLocation(name, table=data)


def prepare_source(
    source: Source,
    settings: SequenceSettings | None = None,
    on_bad_image: str = "error",
    image_cache_dir: str | None = None,
    allow_private_addresses: bool = False,
    counts: dict[str, int] | None = None,
    language: str | None = None,
) -> PreparedDataset:
    """
    The prepared dataset of a source. Texts are composed and pictures are read when they are asked for; every picture
    of a kept item is checked here, once: one that cannot be read is refused, or, with `on_bad_image="missing"`, left
    out and counted by its reason. Pictures behind URLs are downloaded to `image_cache_dir`, from inner networks only
    with `allow_private_addresses`; without it they count as missing. `counts` are further statistics, and so is the
    `language`, unless nobody knows it.
    """
    check_language(language)
    catalogue = source.catalogue
    sequences = build_sequences(source.interactions, len(catalogue), settings)
    counts = (counts or {}) | download_pictures(
        catalogue, sequences.kept_items, image_cache_dir, allow_private_addresses
    )
    fill_in_pictures(catalogue)
    has_image, bad_images = check_pictures(catalogue, sequences.kept_items, on_bad_image)
    items = _Items(catalogue, sequences.kept_items, sequences.training_frequencies()[1:], has_image)
    user_ids = source.interactions.user_ids

    def read_sequences(split: str) -> Sequences:
        users, histories, offsets, targets = sequences.split(split)
        return Sequences([user_ids[user] for user in users], histories, offsets, targets)

    split = "leave_one_out" if settings is None else settings.split
    statistics = _statistics(source, split, sequences, items, bad_images, counts)
    if language is not None or source.synthetic:
        statistics["language"] = language or "en"
    return PreparedDataset(items.features, statistics, items.read, read_sequences)


def download_pictures(
    catalogue: Catalogue, kept_items: np.ndarray, cache_dir: str | None, allow_private: bool = False
) -> dict[str, int]:
    """Puts files in the place of the URLs of the kept items' pictures, or nothing without `cache_dir`; returns how
    many were downloaded, and how many not, by reason."""
    images = catalogue.images
    if not isinstance(images, list):
        return {}
    urls = {position: images[position] for position in kept_items.tolist() if isinstance(images[position], str)}
    if cache_dir is None:
        files, report = [None] * len(urls), {"not_downloaded": len(urls)} if urls else {}
    else:
        files, report = fetch_images(list(urls.values()), cache_dir, allow_private=allow_private)
    images = [None if isinstance(image, str) else image for image in images]
    for position, file in zip(urls, files, strict=True):
        images[position] = file
    catalogue.images = images if any(image is not None for image in images) else None
    return {f"image_urls_{reason}": count for reason, count in report.items()}


def fill_in_pictures(catalogue: Catalogue) -> None:
    """Gives the items that have no picture those that are called after their ids."""
    if catalogue.pictures_by_id:
        images = catalogue.images or [None] * len(catalogue)
        catalogue.images = [
            catalogue.pictures_by_id.get(item_id) if image is None else image
            for item_id, image in zip(catalogue.item_ids, images, strict=True)
        ]


def check_pictures(
    catalogue: Catalogue, kept_items: np.ndarray, on_bad_image: str
) -> tuple[np.ndarray, dict[str, int]]:
    """Decodes the pictures of the kept items, one at a time; returns which items of the catalogue are kept and have
    one that can be read, `(catalogue,)` bool, and how many cannot be read, by reason."""
    readable = np.zeros(len(catalogue), bool)
    bad_images: Counter[str] = Counter()
    if catalogue.images is None:
        return readable, bad_images
    roots = None if catalogue.picture_folders is None else resolved(catalogue.picture_folders)
    for position in tqdm(kept_items.tolist(), desc="checking pictures", unit="item", delay=2):
        image = catalogue.images[position]
        if image is not None:
            try:
                read_image(image, catalogue.item_ids[position], roots=roots)
                readable[position] = True
            except BadImageError as error:
                if on_bad_image == "error":
                    raise
                bad_images[error.reason] += 1
    return readable, bad_images


class _Items:
    """
    The kept items of a catalogue as the columns of a prepared dataset: `kept_items` `(items,)` are positions in the
    catalogue, ascending, the first becomes row 1; `frequencies` `(items,)` are occurrences in the training split;
    `has_image` `(catalogue,)` says which items have a picture that can be read.
    """

    def __init__(self, catalogue: Catalogue, kept_items: np.ndarray, frequencies: np.ndarray, has_image: np.ndarray):
        self.catalogue = catalogue
        self.kept_items = kept_items
        self.frequencies = frequencies
        self.has_image = has_image
        self.fields = [name for name in catalogue.fields.column_names if name not in ITEM_FEATURES and name != "image"]
        self.features = datasets.Features(
            ITEM_FEATURES
            | datasets.Features.from_arrow_schema(catalogue.fields.select(self.fields).schema)
            | ({} if catalogue.images is None else {"image": datasets.Image()})
        )

    def read(self, names: list[str]) -> Iterator[pa.Table]:
        """Yields the columns of these names, a row group at a time."""
        schema = datasets.Features({name: self.features[name] for name in names}).arrow_schema
        rows = rows_at_once(names)
        for start in range(0, len(self.kept_items), rows):
            positions = self.kept_items[start : start + rows]
            yield pa.table({name: self._column(name, start, positions) for name in names}, schema=schema)

    def _column(self, name: str, start: int, positions: np.ndarray):
        stop = start + len(positions)
        if name == "row":
            return np.arange(start + 1, stop + 1, dtype=np.int32)
        if name == "item_id":
            return [self.catalogue.item_ids[position] for position in positions]
        if name == "title":
            return self.catalogue.titles(positions)
        if name == "text":
            return self.catalogue.texts(positions)
        if name == "frequency":
            return self.frequencies[start:stop]
        if name == "image":
            return [None if data is None else {"bytes": data, "path": None} for data in map(self._image, positions)]
        return self.catalogue.columns([name], positions)[name]

    def _image(self, position: int) -> str | bytes | None:
        images = self.catalogue.images
        image = images[position] if images is not None and self.has_image[position] else None
        return image.read_bytes() if isinstance(image, Path) else image

    def without_text(self) -> int:
        """How many have no field that an item's text is made of."""
        fields = self.catalogue.columns(self.catalogue.text_fields, self.kept_items)
        return int(np.logical_and.reduce([column.is_null().to_numpy() for column in fields.columns]).sum())


def _statistics(
    source: Source,
    split_name: str,
    sequences: UserSequences,
    items: _Items,
    bad_images: dict[str, int],
    counts: dict[str, int],
) -> dict:
    lengths = np.diff(sequences.offsets)
    num_items = len(sequences.kept_items)
    return {
        "source": source.name,
        "licence": source.licence,
        "synthetic": source.synthetic,
        "split": split_name,
        **{f"{split}_starts": time for split, time in sequences.starts.items()},
        "users": len(sequences.users),
        **{f"{'training' if split == 'train' else split}_users": len(sequences.targets[split][0]) for split in SPLITS},
        "items": num_items,
        "interactions": len(sequences.rows),
        "training_interactions": int(items.frequencies.sum()),
        "shortest_sequence": int(lengths.min()),
        "median_sequence": float(np.median(lengths)),
        "longest_sequence": int(lengths.max()),
        "items_without_training_interactions": int((items.frequencies == 0).sum()),
        # A ranking that leaves out the history can never find these.
        "repeated_test_targets": _repeated_targets(sequences),
        "missing_text": items.without_text(),
        "missing_image": num_items - int(items.has_image.sum()),
        "bad_image": sum(bad_images.values()),
        **{f"bad_image_{reason}": count for reason, count in sorted(bad_images.items())},
        **counts,
        **{f"dropped_{name}": count for name, count in sequences.dropped.items()},
        **{f"skipped_{table}": count for table, count in source.bad_rows.counts.items()},
        **({"skipped_examples": source.bad_rows.examples} if source.bad_rows.examples else {}),
    }


def summary(statistics: dict) -> list[str]:
    """What was kept of the data, what was not, and why: a line for each, without what did not happen."""

    def of(name: str, *dropped: str) -> str:
        kept = statistics[name]
        return f"{kept:,} of {kept + sum(statistics[f'dropped_{one}'] for one in dropped):,} {name}"

    def told(*counts: tuple[str, str]) -> str:
        return ", ".join(f"{statistics[name]:,} {what}" for name, what in counts if statistics.get(name))

    interactions = ("low_ratings", "duplicates", "repeats", "with_users_and_items")
    kept = f"{of('users', 'users', 'short_users')}, {of('items', 'items')}, {of('interactions', *interactions)}"
    by_url = tuple(
        (name, f"by URL: {name.removeprefix('image_urls_').replace('_', ' ')}")
        for name in statistics
        if name.startswith("image_urls_") and name not in ("image_urls_fetched", "image_urls_cached")
    )
    bad = tuple(
        (name, f"that cannot be read: {name.removeprefix('bad_image_').replace('_', ' ')}")
        for name in statistics
        if name.startswith("bad_image_")
    )
    # No pictures at all, and none that is named, is a kind of data, not a lack.
    has_pictures = statistics["missing_image"] < statistics["items"] or by_url or bad
    lines = {
        "kept": kept,
        "dropped users": told(("dropped_short_users", "too short for the split"), ("dropped_users", "by filters")),
        "dropped items": told(("dropped_items", "by min_interactions")),
        "dropped interactions": told(
            ("dropped_low_ratings", "with low ratings"),
            ("dropped_duplicates", "duplicates"),
            ("dropped_repeats", "repeats"),
            ("dropped_with_users_and_items", "of dropped users or items"),
        ),
        "items without": told(
            ("items_without_training_interactions", "training interactions"),
            ("missing_text", "text"),
            *([("missing_image", "picture")] if has_pictures else []),
        ),
        "pictures that are not there": told(*by_url, *bad, ("image_dir_outside", "links out of image_dir")),
        "skipped rows": told(
            *((f"skipped_{table}", f"of {table}") for table in ("interactions", "sequences", "items"))
        ),
    }
    examples = [f"  for example {example}" for example in statistics.get("skipped_examples", [])]
    return [f"{name}: {text}" for name, text in lines.items() if text] + examples


def _repeated_targets(sequences: UserSequences) -> int:
    """How many test targets the user's history holds already."""
    _, histories, offsets, targets = sequences.split("test")
    owners = np.repeat(np.arange(len(targets), dtype=np.int32), np.diff(offsets))
    return len(np.unique(owners[histories == targets[owners]]))

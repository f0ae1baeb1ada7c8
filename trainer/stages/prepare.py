"""
Turns a source of interactions, texts and pictures into the prepared dataset that every other stage reads.

    mmesid prepare --source synthetic --output_dir runs/quickstart/prepared
    mmesid prepare --source sequences --source_dir path/to/folder --output_dir runs/mine/prepared
    mmesid prepare --source amazon_2014 --interactions reviews_Beauty_5.json.gz \
        --items meta_Beauty.json.gz --output_dir runs/beauty/prepared
    mmesid prepare --source amazon_2023 \
        --interactions McAuley-Lab/Amazon-Reviews-2023 --interactions_config raw_review_All_Beauty \
        --items McAuley-Lab/Amazon-Reviews-2023 --items_config raw_meta_All_Beauty --output_dir runs/beauty/prepared
    mmesid prepare --source tabular --interactions orders.csv --time_column ordered_at \
        --items products.parquet --min_interactions 5 --split global_time --output_dir runs/mine/prepared
"""

import dataclasses
from pathlib import Path, PurePosixPath

import numpy as np
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from mmesid.hub_cards import save_card

from ..data.files import local_file, on_the_hub
from ..data.images import fetch_images, list_images
from ..data.prepared import CARD_CONFIGS, write_prepared
from ..data.sequences import build_sequences
from ..data.source import Catalogue, Source
from ..data.sources.amazon import REPOSITORY, configuration_file, read_amazon
from ..data.sources.movielens import read_movielens
from ..data.sources.sequence_files import read_sequence_files
from ..data.sources.synthetic import generate_catalogue
from ..data.sources.tabular import EmbeddedImages, InteractionColumns, ItemColumns, read_tabular
from ..data.table_files import TableLocation
from ..running.arguments import PrepareArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun


# Which of `source_dir`, `interactions` and `items` a source needs, and which others it may have.
REQUIRED = {
    "synthetic": set(),
    "sequences": {"source_dir"},
    "movielens": {"source_dir"},
    "amazon_2014": {"interactions", "items"},
    "amazon_2018": {"interactions", "items"},
    "amazon_2023": {"interactions", "items"},
    "tabular": {"interactions"},
}
OPTIONAL = {"tabular": {"items"}}
# The sources that have a use for a setting which not all of them have; another source refuses it.
USED_BY = {
    **dict.fromkeys(("num_items", "num_users", "seed"), {"synthetic"}),
    **dict.fromkeys(
        ("source_name", "licence", "text_fields", "image_dir", "image_cache_dir", "download_images"),
        REQUIRED.keys() - {"synthetic"},
    ),
    **dict.fromkeys(("item_field", "image_field"), {"sequences", "tabular"}),
    **dict.fromkeys(
        (
            "user_column", "item_column", "time_column", "rating_column", "title_field", "description_field",
            "brand_field", "categories_field", "price_field",
        ),
        {"tabular"},
    ),
    **dict.fromkeys(
        (
            "interactions_config", "interactions_split", "interactions_revision", "items_config", "items_split",
            "items_revision",
        ),
        {"amazon_2014", "amazon_2018", "amazon_2023", "tabular"},
    ),
}  # fmt: skip

# In the order in which they are applied.
FILTERS = ("min_rating", "duplicates", "repeats", "min_interactions")


def check_arguments(arguments: PrepareArguments) -> None:
    """Raises `ValueError` if the arguments do not say where the data are, or set what the source has no use for."""
    required = REQUIRED[arguments.source]
    for name in ("source_dir", "interactions", "items"):
        value = getattr(arguments, name)
        if (value is None) == (name in required) and name not in OPTIONAL.get(arguments.source, ()):
            raise ValueError(
                f"`--source {arguments.source}` {'needs' if name in required else 'does not read'} {name}, "
                f"got {value!r}; see --help."
            )
    for name, value in arguments.changed.items():
        if arguments.source not in USED_BY.get(name, {arguments.source}):
            raise ValueError(
                f"`--source {arguments.source}` has no use for {name}, got {value!r}; leave it out, see --help."
            )
    if arguments.download_images and arguments.image_cache_dir is None:
        raise ValueError("download_images needs image_cache_dir, the folder that keeps the pictures.")
    if arguments.image_dir is not None and Path(arguments.image_dir).is_file() and arguments.image_cache_dir is None:
        raise ValueError("An archive as image_dir needs image_cache_dir, the folder that it is unpacked into.")


def data_locations(arguments: PrepareArguments) -> dict[str, TableLocation]:
    """Where the data are, by argument: files of the Hub downloaded, its repositories at the commit they are at now."""
    locations = {}
    for name in ("interactions", "items"):
        path = getattr(arguments, name)
        if path is None:
            continue
        location = TableLocation(
            path,
            config=getattr(arguments, f"{name}_config"),
            split=getattr(arguments, f"{name}_split"),
            revision=getattr(arguments, f"{name}_revision"),
        )
        if arguments.source == "amazon_2023" and path == REPOSITORY:
            location = configuration_file(name, location.config, location.revision)
        if location.is_file():
            location = dataclasses.replace(location, path=str(local_file(location.path)))
        elif location.is_repository() and not HF_HUB_OFFLINE:
            with on_the_hub(path):
                commit = HfApi().dataset_info(path, revision=location.revision).sha
            location = dataclasses.replace(location, revision=commit)
            # The name of a repository says nothing about what is in it: a new commit is another input.
            arguments.changed[f"{name}_revision"] = commit
        locations[name] = location
    return locations


def read_source(arguments: PrepareArguments, locations: dict[str, TableLocation], pictures: dict[str, Path]) -> Source:
    """Reads or generates the raw data. A new kind of source is a reader that returns a `Source`, and a branch here."""
    if arguments.source == "synthetic":
        return generate_catalogue(arguments.num_items, arguments.num_users, arguments.seed)
    described = {
        "text_fields": arguments.text_fields,
        "name": arguments.source_name,
        "licence": arguments.licence,
    }
    if arguments.source == "sequences":
        return read_sequence_files(
            arguments.source_dir,
            item_field=arguments.item_field or "item",
            image_field=arguments.image_field,
            pictures=pictures,
            **described,
        )
    if arguments.source == "movielens":
        return read_movielens(arguments.source_dir, **described)
    if arguments.source.startswith("amazon"):
        year = int(arguments.source.removeprefix("amazon_"))
        return read_amazon(year, locations["interactions"], locations["items"], **described)
    return read_tabular(
        locations["interactions"],
        InteractionColumns(
            user=arguments.user_column,
            item=arguments.item_column,
            time=arguments.time_column or None,
            rating=arguments.rating_column,
        ),
        locations.get("items"),
        ItemColumns(
            item=arguments.item_field or arguments.item_column,
            title=arguments.title_field,
            description=arguments.description_field,
            brand=arguments.brand_field,
            categories=arguments.categories_field,
            price=arguments.price_field,
            image=arguments.image_field,
        ),
        pictures=pictures,
        **described,
    )


def pictures_by_id(catalogue: Catalogue, pictures: dict[str, Path]) -> dict[str, Path]:
    """
    The pictures of `image_dir` by the id of the item that they are called after.

    Raises:
        ValueError: If none of the pictures is called after an item or named by one, or the table of the items holds
            pictures itself.
    """
    if not pictures:
        return {}
    if isinstance(catalogue.images, EmbeddedImages):
        raise ValueError(
            f"The items hold their pictures themselves, in '{catalogue.images.column}'; leave out --image_dir, or "
            "name another --image_field."
        )
    by_id = {PurePosixPath(name).stem: path for name, path in pictures.items()}
    named = {image for image in catalogue.images or () if isinstance(image, Path)}
    if by_id.keys().isdisjoint(catalogue.item_ids) and named.isdisjoint(pictures.values()):
        raise ValueError(
            f"No picture of image_dir is called after an item: the first is '{next(iter(pictures))}', the first item "
            f"'{catalogue.item_ids[0]}'; rename the pictures, or name them in a field of the items."
        )
    return by_id


def fill_in_pictures(catalogue: Catalogue, by_id: dict[str, Path]) -> None:
    """Gives the items that have no picture, after the downloads, those that are called after their ids."""
    if by_id:
        images = catalogue.images or [None] * len(catalogue)
        catalogue.images = [
            by_id.get(item_id) if image is None else image
            for item_id, image in zip(catalogue.item_ids, images, strict=True)
        ]


def download_pictures(catalogue: Catalogue, kept_items: np.ndarray, cache_dir: str | None) -> dict[str, int]:
    """
    Puts files in the place of the URLs of the kept items' pictures, or, without `cache_dir`, nothing.

    Returns:
        `dict[str, int]`: How many were downloaded, and how many not, by reason.
    """
    images = catalogue.images
    if not isinstance(images, list):
        return {}
    urls = {position: images[position] for position in kept_items.tolist() if isinstance(images[position], str)}
    if cache_dir is None:
        files, report = [None] * len(urls), {"not_downloaded": len(urls)} if urls else {}
    else:
        files, report = fetch_images(list(urls.values()), cache_dir)
    images = [None if isinstance(image, str) else image for image in images]
    for position, file in zip(urls, files, strict=True):
        images[position] = file
    catalogue.images = images if any(image is not None for image in images) else None
    return {f"image_urls_{reason}": count for reason, count in report.items()}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PrepareArguments, argv)
    check_arguments(arguments)
    locations = data_locations(arguments)
    inputs = {name: location.path for name, location in locations.items() if not location.is_repository()}
    if arguments.source_dir is not None:
        inputs["source_dir"] = arguments.source_dir
    if arguments.image_dir is not None:
        inputs["image_dir"] = arguments.image_dir
    run = StageRun("prepare", arguments, inputs)
    if run.is_up_to_date():
        return
    with run as staging:
        if PartialState().is_main_process:
            pictures, counts = {}, {}
            if arguments.image_dir is not None:
                pictures, report = list_images(arguments.image_dir, arguments.image_cache_dir or staging)
                counts = {f"image_dir_{reason}": count for reason, count in report.items()}
            source = read_source(arguments, locations, pictures)
            by_id = pictures_by_id(source.catalogue, pictures)
            sequences = build_sequences(
                source.interactions,
                len(source.catalogue),
                min_interactions=arguments.min_interactions,
                min_rating=arguments.min_rating,
                duplicates=arguments.duplicates,
                repeats=arguments.repeats,
                split=arguments.split,
                validation_fraction=arguments.validation_fraction,
                test_fraction=arguments.test_fraction,
            )
            counts |= download_pictures(
                source.catalogue,
                sequences.kept_items,
                arguments.image_cache_dir if arguments.download_images else None,
            )
            fill_in_pictures(source.catalogue, by_id)
            statistics = write_prepared(staging, source, sequences, arguments.on_bad_image, counts)
            filters = {name: getattr(arguments, name) for name in FILTERS}
            run.details.update(data=statistics, configs=CARD_CONFIGS, filters=filters)
            save_card(staging, dataclasses.asdict(run.draft_record()))


if __name__ == "__main__":
    run_as_script("prepare", main)

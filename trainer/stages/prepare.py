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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from ..data.files import local_file, on_the_hub
from ..data.images import list_images
from ..data.preparation import prepare_source
from ..data.prepared import CARD_CONFIGS
from ..data.sequences import SequenceSettings
from ..data.source import Source
from ..data.sources import SETTINGS, SOURCES, reader_of, settings_of
from ..data.sources.amazon import file_of
from ..data.table_files import TableLocation
from ..publishing.repository import present
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun


# In the order in which they are applied.
FILTERS = ("min_rating", "duplicates", "repeats", "min_interactions")


@dataclass(kw_only=True)
class PrepareArguments(StageArguments, SequenceSettings):
    """
    Turn interactions, item texts and item images into the prepared dataset that every other stage reads.

    Args:
        > Data

        source (`str`): synthetic: a generated catalogue; sequences: a folder with sequences.txt and items.jsonl;
            amazon_2014, amazon_2018, amazon_2023: reviews and metadata of that generation; movielens: the folder of
            MovieLens 1M or 100K; tabular: any two tables whose columns you name.
        source_dir (`str`, *optional*): sequences, movielens: the folder.
        interactions (`str`, *optional*): amazon_*, tabular: file of the interactions (.jsonl, .json, .csv, .tsv or
            .parquet, .gz if gzipped), hf://datasets/owner/name/file for one on the Hub, or a folder or repository that
            `datasets.load_dataset` loads; amazon_2023: also McAuley-Lab/Amazon-Reviews-2023.
        interactions_config (`str`, *optional*): amazon_*, tabular: configuration of a folder or repository of
            interactions; of McAuley-Lab/Amazon-Reviews-2023, raw_review_All_Beauty, say.
        interactions_split (`str`, *optional*, defaults to `"train"`): amazon_*, tabular: split of a folder or
            repository of interactions.
        interactions_revision (`str`, *optional*): amazon_*, tabular: branch, tag or commit of a repository of
            interactions.
        items (`str`, *optional*): amazon_*, tabular: the items, in the same forms; tabular may do without.
        items_config (`str`, *optional*): amazon_*, tabular: configuration of a folder or repository of items; of
            McAuley-Lab/Amazon-Reviews-2023, raw_meta_All_Beauty, say.
        items_split (`str`, *optional*, defaults to `"train"`): amazon_*, tabular: split of a folder or repository of
            items.
        items_revision (`str`, *optional*): amazon_*, tabular: branch, tag or commit of a repository of items.
        source_name (`str`, *optional*): What the data are called on the card; by default after the folder or file they
            come from.
        licence (`str`, *optional*, defaults to `"unknown"`): Terms under which the data may be used, for the card; not
            synthetic.

        > Columns

        user_column (`str`, *optional*, defaults to `"user_id"`): tabular: column of the interactions: user.
        item_column (`str`, *optional*, defaults to `"item_id"`): tabular: column of the interactions: item.
        time_column (`str`, *optional*, defaults to `"timestamp"`): tabular: column of the interactions: time, as
            number, timestamp or ISO 8601; empty if the rows are in the order of time.
        rating_column (`str`, *optional*): tabular: column of the interactions: rating, if there is one.
        item_field (`str`, *optional*): Field of an item: its id; sequences: `item` by default, tabular: as
            `item_column`.
        title_field (`str`, *optional*, defaults to `"title"`): tabular: field of an item: title.
        description_field (`str`, *optional*, defaults to `"description"`): tabular: field of an item: description.
        brand_field (`str`, *optional*, defaults to `"brand"`): tabular: field of an item: brand.
        categories_field (`str`, *optional*, defaults to `"categories"`): tabular: field of an item: categories, a list
            or a string with |.
        price_field (`str`, *optional*, defaults to `"price"`): tabular: field of an item: price.
        image_field (`str`, *optional*, defaults to `"image"`): sequences, tabular: field of an item: its picture, as a
            file, a URL or (in Parquet and `datasets`) the picture itself.
        text_fields (`list[str]`, *optional*): Fields that make an item's text, in order; by default those present of
            title, attributes, genres, brand, categories, description.

        > Pictures

        image_dir (`str`, *optional*): Folder, zip or tar archive of pictures: those that items name, and, for items
            without a picture or with a URL that is not downloaded, those called after their ids (A7.jpg); by default
            pictures are looked for beside the items. Not synthetic.
        download_images (`bool`, *optional*, defaults to `False`): Download pictures that the items name by URL;
            otherwise they count as missing.
        image_cache_dir (`str`, *optional*): Folder that keeps what is downloaded or unpacked.
        on_bad_image (`str`, *optional*, defaults to `"error"`): What to do with a picture that
            cannot be read: stop, or count it as missing.

        > Synthetic

        num_items (`int`, *optional*, defaults to `600`): synthetic: items in the catalogue.
        num_users (`int`, *optional*, defaults to `3000`): synthetic: users.
        seed (`int`, *optional*, defaults to `0`): synthetic: seed of catalogue, pictures and users.
    """

    source: str
    source_dir: str | None = None
    interactions: str | None = None
    interactions_config: str | None = None
    interactions_split: str = "train"
    interactions_revision: str | None = None
    items: str | None = None
    items_config: str | None = None
    items_split: str = "train"
    items_revision: str | None = None
    source_name: str | None = None
    licence: str = "unknown"
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    rating_column: str | None = None
    item_field: str | None = None
    title_field: str = "title"
    description_field: str = "description"
    brand_field: str = "brand"
    categories_field: str = "categories"
    price_field: str = "price"
    image_field: str = "image"
    text_fields: list[str] | None = None
    image_dir: str | None = None
    download_images: bool = False
    image_cache_dir: str | None = None
    on_bad_image: Literal["error", "missing"] = "error"
    num_items: int = 600
    num_users: int = 3000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            share=("validation_fraction", "test_fraction"),
            positive=("num_items", "num_users"),
            not_negative=("min_interactions", "seed"),
        )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"--validation_fraction {self.validation_fraction} and --test_fraction {self.test_fraction} leave "
                "nothing to train on; lower them."
            )
        check_arguments(self)
        SequenceSettings.__post_init__(self)


def check_arguments(arguments: PrepareArguments) -> None:
    """Raises `ValueError` if the arguments do not say where the data are, or set what the source has no use for."""
    used = settings_of(arguments.source)
    for name, needed in used.items():
        if needed and getattr(arguments, name) is None:
            raise ValueError(f"`--source {arguments.source}` needs {name}; see --help.")
    others = {name for source in SOURCES for name in settings_of(source)} - used.keys()
    for name in arguments.changed:
        if name in others:
            raise ValueError(
                f"`--source {arguments.source}` has no use for {name}, got {getattr(arguments, name)!r}; leave it "
                "out, see --help."
            )
    if arguments.download_images and arguments.image_cache_dir is None:
        raise ValueError("download_images needs image_cache_dir, the folder that keeps the pictures.")
    if arguments.image_dir is not None and Path(arguments.image_dir).is_file() and arguments.image_cache_dir is None:
        raise ValueError("An archive as image_dir needs image_cache_dir, the folder that it is unpacked into.")


def data_locations(arguments: PrepareArguments) -> dict[str, TableLocation]:
    """Where the tables are: files of the Hub downloaded, its repositories at the commit they are at now."""
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
        location = file_of(location, name)
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
    """Calls the source's reader with the settings that it uses; what is not set is left to the reader."""
    combined = {name for names in SETTINGS.values() for name in names}
    settings = {name: getattr(arguments, name) for name in settings_of(arguments.source) if name not in combined}
    settings |= locations | ({"pictures": pictures} if pictures else {})
    return reader_of(arguments.source)(**{name: value for name, value in settings.items() if value is not None})


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PrepareArguments, argv)
    locations = data_locations(arguments)
    inputs: dict = {name: location.path for name, location in locations.items() if not location.is_repository()}
    if arguments.source_dir is not None:
        inputs["source_dir"] = arguments.source_dir
    if arguments.image_dir is not None:
        inputs["image_dir"] = arguments.image_dir
    run = StageRun("prepare", arguments, inputs)
    if run.is_up_to_date():
        return
    with run as staging:
        if PartialState().is_main_process:
            pictures: dict[str, Path] = {}
            counts: dict[str, int] = {}
            if arguments.image_dir is not None:
                pictures, report = list_images(arguments.image_dir, arguments.image_cache_dir or staging)
                counts = {f"image_dir_{reason}": count for reason, count in report.items()}
            data = prepare_source(
                read_source(arguments, locations, pictures),
                arguments,
                arguments.on_bad_image,
                arguments.image_cache_dir if arguments.download_images else None,
                counts,
            )
            data.save(staging)
            filters = {name: getattr(arguments, name) for name in FILTERS}
            run.details.update(data=data.statistics, configs=CARD_CONFIGS, filters=filters)
            present(run)


if __name__ == "__main__":
    run_as_script("prepare", main)

"""
Turns a source of interactions, texts and pictures into the prepared dataset that every other stage reads.

    mmesid prepare --source synthetic --output_dir runs/quickstart/prepared
    mmesid prepare --source sequences --source_dir path/to/folder --output_dir runs/mine/prepared
    mmesid prepare --source amazon_2014 --interactions reviews_Beauty_5.json.gz \
        --items meta_Beauty.json.gz --output_dir runs/beauty/prepared
    mmesid prepare --source amazon_2023 \
        --interactions McAuley-Lab/Amazon-Reviews-2023:raw_review_All_Beauty \
        --items McAuley-Lab/Amazon-Reviews-2023:raw_meta_All_Beauty --output_dir runs/beauty/prepared
    mmesid prepare --source tabular --interactions orders.csv --columns user_id=buyer timestamp=ordered_at \
        --items products.parquet --item_fields title=name --min_interactions 5 --output_dir runs/mine/prepared
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from mmesid.hub_cards.names import printable

from ..data.files import local_file, on_the_hub
from ..data.images import list_images
from ..data.preparation import check_language, prepare_source, summary
from ..data.prepared import CARD_CONFIGS
from ..data.sequences import SequenceSettings
from ..data.source import Source
from ..data.sources import PICTURES, SOURCES, reader_of, settings_of
from ..data.sources.amazon import file_of
from ..data.sources.tabular import COLUMNS, ITEM_FIELDS
from ..data.table_files import TableLocation, chosen_names, parse_location, renamed
from ..publishing.repository import present
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun


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
        interactions (`str`, *optional*): amazon_*, tabular: the interactions: a file (.jsonl, .json, .csv, .tsv, .txt,
            .parquet, or RecBole's .inter and .item; with .gz if gzipped, .zip if zipped), hf://datasets/owner/name/file
            for one on the Hub, or a folder or repository that `datasets.load_dataset` loads, as
            owner/name:config@revision[split], of which all but the name may be left out; amazon_2023: also
            McAuley-Lab/Amazon-Reviews-2023:raw_review_All_Beauty.
        items (`str`, *optional*): amazon_*, tabular: the items, in the same forms; tabular may do without.
        source_name (`str`, *optional*): What the data are called on the card; by default as their folder or file.
        licence (`str`, *optional*, defaults to `"unknown"`): Terms under which the data may be used, for the card; not
            synthetic.
        language (`str`, *optional*): Language of titles and texts, for the card: a code of ISO 639, such as en.

        > Columns

        columns (`list[str]`, *optional*): tabular: columns of the interactions that have other names than ours, as
            ours=theirs each, for example user_id=buyer; theirs are numbers, from 1, in a file without a header. Ours
            are user_id, item_id, timestamp (a number, a timestamp or ISO 8601; `timestamp=` if the rows are in the
            order of time) and rating, which is read only if you name it.
        item_fields (`list[str]`, *optional*): sequences, tabular: fields of the items that have other names than ours,
            in the same form. Ours are item_id (by default `item` in sequences, and named as in the interactions in
            tabular), image (a file, a URL or, in Parquet and `datasets`, the picture itself) and, in tabular, title,
            description, brand, categories (a list, or a string with |) and price.
        text_fields (`list[str]`, *optional*): Fields that make an item's text, in order; by default those present of
            title, attributes, genres, brand, categories, features, description. amazon_*: also any other field of the
            metadata, such as details, store or main_category; sequences, tabular: any other field of the items.

        time_format (`str`, *optional*): tabular: how times are written that are neither numbers nor ISO 8601, in the
            codes of strptime, for example %d/%m/%Y %H:%M.
        on_bad_row (`str`, *optional*, defaults to `"error"`): What to do with a row that cannot be read, repeats an
            item, or has a time far from all others: stop, or skip and count it, with the first examples. Not
            synthetic.

        > Pictures

        image_dir (`str`, *optional*): Folder, zip or tar archive of pictures: those that items name, and, for items
            without a picture or with a URL that is not downloaded, those called after their ids (A7.jpg); by default
            pictures are looked for beside the items, and nowhere else. Not synthetic.
        download_images (`bool`, *optional*, defaults to `False`): Download pictures that the items name by URL;
            otherwise they count as missing.
        allow_private_addresses (`bool`, *optional*, defaults to `False`): Download from addresses of an inner network,
            such as this machine, too.
        image_cache_dir (`str`, *optional*): Folder that keeps what is downloaded or unpacked.
        on_bad_image (`str`, *optional*, defaults to `"error"`): What to do with a picture that cannot be read: stop,
            or count it as missing.

        > Synthetic

        num_items (`int`, *optional*, defaults to `600`): synthetic: items in the catalogue.
        num_users (`int`, *optional*, defaults to `3000`): synthetic: users.
        seed (`int`, *optional*, defaults to `0`): synthetic: seed of catalogue, pictures and users.
    """

    source: str
    source_dir: str | None = None
    interactions: str | None = None
    items: str | None = None
    source_name: str | None = None
    licence: str = "unknown"
    language: str | None = None
    columns: list[str] | None = None
    item_fields: list[str] | None = None
    text_fields: list[str] | None = None
    time_format: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    image_dir: str | None = None
    download_images: bool = False
    allow_private_addresses: bool = False
    image_cache_dir: str | None = None
    on_bad_image: Literal["error", "missing"] = "error"
    num_items: int = 600
    num_users: int = 3000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("num_items", "num_users"), not_negative=("seed",))
        check_arguments(self)
        SequenceSettings.__post_init__(self)
        check_language(self.language)


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
    renamed(COLUMNS, chosen_names("columns", arguments.columns), "columns")
    renamed(ITEM_FIELDS, chosen_names("item_fields", arguments.item_fields), "item_fields")
    if arguments.download_images and arguments.image_cache_dir is None:
        raise ValueError("download_images needs image_cache_dir, the folder that keeps the pictures.")
    if arguments.image_dir is not None and Path(arguments.image_dir).is_file() and arguments.image_cache_dir is None:
        raise ValueError("An archive as image_dir needs image_cache_dir, the folder that it is unpacked into.")


def data_locations(arguments: PrepareArguments) -> dict[str, TableLocation]:
    """Where the tables are: files of the Hub downloaded, its repositories at the commit they are at now."""
    locations = {}
    for name in ("interactions", "items"):
        if getattr(arguments, name) is None:
            continue
        asked = parse_location(getattr(arguments, name))
        location = file_of(asked, name)
        if location.is_file():
            location = dataclasses.replace(location, path=str(local_file(location.path)))
        elif location.is_repository() and not HF_HUB_OFFLINE:
            with on_the_hub(location.path):
                commit = HfApi().dataset_info(location.path, revision=location.revision).sha
            # The name of a repository says nothing about what is in it: a new commit is another input.
            location = asked = dataclasses.replace(location, revision=commit)
        locations[name] = location
        # So is another part of the same folder.
        parts = {"config": asked.config, "split": asked.split, "revision": asked.revision}
        arguments.changed[name] = asked.path
        arguments.changed |= {f"{name}_{part}": one for part, one in parts.items() if one not in (None, "train")}
    return locations


def read_source(arguments: PrepareArguments, locations: dict[str, TableLocation], pictures: dict[str, Path]) -> Source:
    """Calls the source's reader with the settings that it uses; what is not set is left to the reader."""
    settings = {name: getattr(arguments, name) for name in settings_of(arguments.source) if name not in PICTURES}
    for name in settings.keys() & {"columns", "item_fields"}:
        settings[name] = chosen_names(name, settings[name])
    settings |= locations | ({"pictures": pictures} if pictures else {})
    return reader_of(arguments.source)(**{name: value for name, value in settings.items() if value is not None})


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PrepareArguments, argv)
    locations = data_locations(arguments)
    read = {name: location.path for name, location in locations.items() if not location.is_repository()}
    read |= {"source_dir": arguments.source_dir, "image_dir": arguments.image_dir}
    inputs = {name: path for name, path in read.items() if path is not None}
    run = StageRun("prepare", arguments, inputs)
    if run.is_up_to_date():
        return
    with run as staging:
        if PartialState().is_main_process:
            pictures: dict[str, Path] = {}
            report: dict[str, int] = {}
            if arguments.image_dir is not None:
                pictures, report = list_images(arguments.image_dir, arguments.image_cache_dir or staging)
            source = read_source(arguments, locations, pictures)
            cache_dir = arguments.image_cache_dir if arguments.download_images else None
            counts = {f"image_dir_{reason}": count for reason, count in report.items()}
            data = prepare_source(
                source,
                arguments,
                arguments.on_bad_image,
                cache_dir,
                arguments.allow_private_addresses,
                counts,
                arguments.language,
            )
            data.save(staging)
            # In the order in which they are applied.
            filters = ("min_rating", "duplicates", "repeats", "min_interactions")
            run.details.update(data=data.statistics, configs=CARD_CONFIGS)
            run.details["filters"] = {name: getattr(arguments, name) for name in filters}
            present(run)
    if PartialState().is_main_process:
        for line in summary(data.statistics):
            print(f"  {printable(line)}")


if __name__ == "__main__":
    run_as_script("prepare", main)

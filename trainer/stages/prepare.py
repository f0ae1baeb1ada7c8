"""
Turns a source of interactions, texts and pictures into the prepared dataset that every other stage reads.

    python -m trainer.stages.prepare --source synthetic --output_dir runs/quickstart/prepared
    python -m trainer.stages.prepare --source sequences --source_dir path/to/folder --output_dir runs/mine/prepared
    python -m trainer.stages.prepare --source amazon_2014 --interactions reviews_Beauty_5.json.gz \
        --items meta_Beauty.json.gz --output_dir runs/beauty/prepared
    python -m trainer.stages.prepare --source tabular --interactions orders.csv --time_column ordered_at \
        --items products.parquet --min_interactions 5 --split global_time --output_dir runs/mine/prepared
"""

import dataclasses

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from hub_cards import save_card

from ..arguments import PrepareArguments, parse
from ..data.amazon import read_amazon
from ..data.files import local_file
from ..data.movielens import read_movielens
from ..data.prepared import CARD_CONFIGS, write_prepared
from ..data.sequence_files import read_sequence_files
from ..data.sequences import build_sequences
from ..data.source import Source
from ..data.synthetic import generate_catalogue
from ..data.tabular import InteractionColumns, ItemColumns, TableLocation, read_tabular
from ..records import StageRun


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


def check_arguments(arguments: PrepareArguments) -> None:
    """Raises `ValueError` if the arguments do not say where the data of the source are, or say it of another one."""
    required = REQUIRED[arguments.source]
    for name in ("source_dir", "interactions", "items"):
        value = getattr(arguments, name)
        if (value is None) == (name in required) and name not in OPTIONAL.get(arguments.source, ()):
            raise ValueError(
                f"`--source {arguments.source}` {'needs' if name in required else 'does not read'} {name}, "
                f"got {value!r}; see --help."
            )
    if arguments.download_images and arguments.image_cache_dir is None:
        raise ValueError("download_images needs image_cache_dir, the folder that keeps the pictures.")


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
        if location.is_file():
            location = dataclasses.replace(location, path=str(local_file(path)))
        elif location.is_repository() and not HF_HUB_OFFLINE:
            commit = HfApi().dataset_info(path, revision=location.revision).sha
            location = dataclasses.replace(location, revision=commit)
            # The name of a repository says nothing about what is in it: a new commit is another input.
            arguments.changed[f"{name}_revision"] = commit
        locations[name] = location
    return locations


def read_source(arguments: PrepareArguments, locations: dict[str, TableLocation]) -> Source:
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
            **described,
        )
    if arguments.source == "movielens":
        return read_movielens(arguments.source_dir, **described)
    if arguments.source.startswith("amazon"):
        year = int(arguments.source.removeprefix("amazon_"))
        return read_amazon(year, locations["interactions"].path, locations["items"].path, **described)
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
        image_dir=arguments.image_dir,
        **described,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PrepareArguments, argv)
    check_arguments(arguments)
    locations = data_locations(arguments)
    inputs = {name: location.path for name, location in locations.items() if not location.is_repository()}
    if arguments.source_dir is not None:
        inputs["source_dir"] = arguments.source_dir
    run = StageRun("prepare", arguments, inputs)
    if run.is_up_to_date():
        return
    with run as staging:
        if PartialState().is_main_process:
            source = read_source(arguments, locations)
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
            statistics = write_prepared(staging, source, sequences, arguments.on_bad_image)
            run.details.update(data=statistics, configs=CARD_CONFIGS)
            save_card(staging, dataclasses.asdict(run.draft_record()))


if __name__ == "__main__":
    main()

"""
Turns a source of interactions, texts and pictures into the prepared dataset that every other stage reads.

    python -m trainer.stages.prepare --source synthetic --output_dir runs/quickstart/prepared
    python -m trainer.stages.prepare --source sequences --source_dir path/to/folder --output_dir runs/mine/prepared
"""

import dataclasses

from accelerate import PartialState

from hub_cards import save_card

from ..arguments import PrepareArguments, parse
from ..data.prepared import CARD_CONFIGS, write_prepared
from ..data.sequence_files import read_sequence_files
from ..data.sequences import build_sequences
from ..data.source import Source
from ..data.synthetic import generate_catalogue
from ..records import StageRun


def read_source(arguments: PrepareArguments) -> Source:
    """Reads or generates the raw data. A new kind of source is a reader that returns a `Source`, and a branch here."""
    if arguments.source == "synthetic":
        return generate_catalogue(arguments.num_items, arguments.num_users, arguments.seed)
    return read_sequence_files(
        arguments.source_dir,
        text_fields=arguments.text_fields,
        item_field=arguments.item_field,
        image_field=arguments.image_field,
        name=arguments.source_name,
        licence=arguments.licence,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PrepareArguments, argv)
    if (arguments.source == "sequences") != (arguments.source_dir is not None):
        raise ValueError(
            f"source_dir names the folder of `--source sequences` and of nothing else; got {arguments.source_dir!r} "
            f"for `--source {arguments.source}`."
        )
    run = StageRun(
        "prepare", arguments, inputs={} if arguments.source_dir is None else {"source_dir": arguments.source_dir}
    )
    if run.is_up_to_date():
        return
    with run as staging:
        if PartialState().is_main_process:
            source = read_source(arguments)
            sequences = build_sequences(source.interactions, len(source.catalogue), arguments.min_interactions)
            statistics = write_prepared(staging, source, sequences, arguments.on_bad_image)
            run.details.update(data=statistics, configs=CARD_CONFIGS)
            save_card(staging, dataclasses.asdict(run.draft_record()))


if __name__ == "__main__":
    main()

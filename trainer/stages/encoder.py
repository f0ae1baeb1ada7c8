"""
Trains a dual encoder of texts and pictures on the catalogue's own pairs, from a small new CLIP or from a model that is
named; `mmesid embed --encoder dual_encoder` reads it.

    mmesid encoder --prepared_dir runs/mine/prepared --output_dir runs/mine/encoder
    mmesid encoder --prepared_dir runs/mine/prepared --output_dir runs/mine/encoder \
        --model_name_or_path openai/clip-vit-base-patch32
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import PartialState
from transformers import set_seed

from ..data.prepared import PreparedDataset
from ..encoders.dual_encoder import (
    SMALLEST_CROP,
    CaptionedPictures,
    DualEncoder,
    DualEncoderTrainer,
    DualEncoderTrainingArguments,
    ItemPictures,
    shrink,
)
from ..encoders.remote_code import describe_model, require_pinned_code
from ..publishing.repository import present
from ..running.arguments import StageArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


FEWEST_PAIRS = 20
# Retrieval compares all held-out pairs with each other.
MOST_HELD_OUT_PAIRS = 2000


@dataclass(kw_only=True)
class EncoderArguments(StageArguments):
    """
    Train a dual encoder on the catalogue's own pairs of text and picture.

    Args:
        > Data

        prepared_dir (`str`): Directory written by `mmesid prepare`.
        caption_column (`str`, *optional*, defaults to `"text"`): The text that goes with a
            picture.

        > Pretrained model

        model_name_or_path (`str`, *optional*): CLIP or SigLIP model to begin with, a directory or a name on the Hub;
            by default a small new CLIP.
        revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model's repository brings,
            and no other; takes a full commit hash as --revision.

        > New CLIP

        image_size (`int`, *optional*, defaults to `64`): Side in pixels of the square that pictures are resized to.
        patch_size (`int`, *optional*, defaults to `32`): Side of a patch in pixels; large ones learn shapes from few
            pictures.
        hidden_size (`int`, *optional*, defaults to `128`): Width of both transformers.
        num_hidden_layers (`int`, *optional*, defaults to `2`): Blocks of either transformer.
        projection_dim (`int`, *optional*, defaults to `128`): Width of the embeddings.
        max_text_length (`int`, *optional*, defaults to `32`): Tokens that a text is cut to.
        min_word_frequency (`int`, *optional*, defaults to `5`): Occurrences of a word in the texts below which it is
            unknown.
    """

    training_class = DualEncoderTrainingArguments

    prepared_dir: str
    caption_column: Literal["title", "text"] = "text"
    model_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    image_size: int = 64
    patch_size: int = 32
    hidden_size: int = 128
    num_hidden_layers: int = 2
    projection_dim: int = 128
    max_text_length: int = 32
    min_word_frequency: int = 5

    def __post_init__(self):
        super().__post_init__()
        sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "projection_dim", "max_text_length")
        check_ranges(self, positive=(*sizes, "min_word_frequency"))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(EncoderArguments, argv)
    require_pinned_code(arguments.model_name_or_path, arguments.revision, arguments.trust_remote_code)
    inputs = {"prepared_dir": arguments.prepared_dir}
    if arguments.model_name_or_path is not None and os.path.isdir(arguments.model_name_or_path):
        inputs["model_name_or_path"] = arguments.model_name_or_path
    run = StageRun("encoder", arguments, inputs)
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    set_seed(arguments.training.seed)
    with run as staging:
        trainer = train_dual_encoder(arguments, data, run)
        if PartialState().is_main_process:
            trainer.encoder.save_pretrained(staging)
            present(run, trainer.hub_links)
    trainer.publish(arguments.output_dir)


def train_dual_encoder(arguments: EncoderArguments, data: PreparedDataset, run: StageRun) -> DualEncoderTrainer:
    """Trains a dual encoder on the catalogue's own pairs, from a small new CLIP or from a model that is named."""
    pictures = ItemPictures(data.items())
    rows = pictures.rows.tolist()
    texts = data.titles if arguments.caption_column == "title" else data.texts
    captions = [texts[row] for row in rows]
    pairs = [index for index, caption in enumerate(captions) if caption.strip()]
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"'{arguments.prepared_dir}' has {len(pairs)} items with both {arguments.caption_column} and picture, "
            f"fewer than the {FEWEST_PAIRS} that training takes; name a trained "
            "model to `mmesid embed` instead."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(arguments.training.seed)).tolist()
    num_held_out = min(max(round(arguments.training.held_out_fraction * len(pairs)), 2), MOST_HELD_OUT_PAIRS)
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
        pictures = shrink(pictures, round(arguments.image_size / SMALLEST_CROP), arguments.training.disable_tqdm)
    else:
        encoder = DualEncoder.from_pretrained(
            arguments.model_name_or_path, arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
        run.details.update(
            describe_model(arguments.model_name_or_path, arguments.revision), base_model=arguments.model_name_or_path
        )
    trainer = DualEncoderTrainer(
        encoder,
        trainer_arguments(arguments, run),
        train_dataset=CaptionedPictures(captions, pictures, training, augment=True),
        eval_dataset=CaptionedPictures(captions, pictures, held_out),
        callbacks=early_stopping(arguments.training),
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
    )
    return trainer


if __name__ == "__main__":
    run_as_script("encoder", main)

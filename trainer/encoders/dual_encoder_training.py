"""Training a dual encoder on the catalogue's own pairs of text and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.nn.functional import all_gather
from tqdm.auto import tqdm
from transformers import BatchFeature, EvalPrediction, set_seed

from modeling_mmesid.checkpoints import bar_if_slow

from ..data.prepared import PreparedDataset
from ..publishing.hub_trainer import HubTrainerMixin
from ..running.arguments import BestEpochTrainingArguments, check_ranges
from ..running.training import FiniteLossTrainer, early_stopping, fit, temporary_arguments
from .dual_encoder import DualEncoder
from .embedding import ItemPictures


FEWEST_PAIRS = 20
# Retrieval compares all held-out pairs with each other.
MOST_HELD_OUT_PAIRS = 2000
# Augmentation of training pairs.
DROPPED_WORDS = 0.3
SMALLEST_CROP = 0.9


@dataclass(eq=False)
class CaptionedPictures(torch.utils.data.Dataset):
    """
    Those pairs of text and picture that `indices` name. With augmentation, a pair never looks the same twice: words
    are left out of the text, and the picture is cropped and mirrored.
    """

    captions: list[str]
    pictures: Sequence[Image.Image]
    indices: list[int]
    augment: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        caption, picture = self.captions[self.indices[index]], self.pictures[self.indices[index]]
        if self.augment:
            caption, picture = drop_words(caption), crop_and_mirror(picture)
        return caption, picture


def drop_words(caption: str) -> str:
    words = caption.split()
    kept = torch.rand(len(words)) >= DROPPED_WORDS
    return " ".join(word for word, keep in zip(words, kept.tolist()) if keep)


def crop_and_mirror(picture: Image.Image) -> Image.Image:
    scale, x, y, mirror = torch.rand(4).tolist()
    scale = SMALLEST_CROP + (1 - SMALLEST_CROP) * scale
    width, height = scale * picture.width, scale * picture.height
    left, top = x * (picture.width - width), y * (picture.height - height)
    picture = picture.crop((round(left), round(top), round(left + width), round(top + height)))
    return ImageOps.mirror(picture) if mirror < 0.5 else picture


def shrink(pictures: Sequence[Image.Image], size: int, disable_tqdm: bool = False) -> list[Image.Image]:
    """The pictures as squares of `size` pixels a side: small enough to be held in memory, and quick to crop."""
    progress = tqdm(range(len(pictures)), desc="pictures", unit="image", delay=2, disable=disable_tqdm)
    return [pictures[index].resize((size, size), Image.Resampling.BICUBIC) for index in progress]


@dataclass(kw_only=True)
class DualEncoderTrainingArguments(BestEpochTrainingArguments):
    """
    Arguments of [`DualEncoderTrainer`].

    Args:
        > Training

        held_out_fraction (`float`, *optional*, defaults to `0.1`): Share of the pairs that training does not see.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("recall@1", "recall@10", "mrr", "loss")

    held_out_fraction: float = 0.1
    num_train_epochs: float = 25
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    warmup_steps: float = 0.1
    weight_decay: float = 0.1
    early_stopping_patience: int = 10
    metric_for_best_model: str | None = "mrr"

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, share=("held_out_fraction",))


def train_dual_encoder(
    data: PreparedDataset,
    args: DualEncoderTrainingArguments | None = None,
    *,
    encoder: DualEncoder | None = None,
    caption_column: str = "text",
    **sizes: int,
) -> DualEncoder:
    """
    Trains a dual encoder on the pairs of text and picture that the items are, and keeps the epoch that finds held-out
    pairs best.

    Args:
        data ([`PreparedDataset`]): Items with texts and pictures.
        args ([`DualEncoderTrainingArguments`], *optional*): Settings of the training. Without them checkpoints go to a
            temporary directory.
        encoder ([`DualEncoder`], *optional*): What to train further; by default a small new CLIP.
        caption_column (`str`, *optional*, defaults to `"text"`): The text that goes with a picture: `"text"` or
            `"title"`.
        **sizes (`int`): Sizes of the new CLIP: fields of [`CLIPSizes`].

    Returns:
        [`DualEncoder`], which [`embed`] takes for texts and for pictures.

    Raises:
        ValueError: If the items are too few pairs, or the sizes do not divide.
    """
    with temporary_arguments(args, DualEncoderTrainingArguments) as args:
        trainer = dual_encoder_trainer(data, args, encoder, caption_column, **sizes)
        fit(trainer)
    return trainer.encoder


def dual_encoder_trainer(
    data: PreparedDataset,
    args: DualEncoderTrainingArguments,
    encoder: DualEncoder | None,
    caption_column: str,
    **sizes,
) -> "DualEncoderTrainer":
    """The trainer of [`train_dual_encoder`], for users who need more than the encoder."""
    if caption_column not in ("text", "title"):
        raise ValueError(f"caption_column is {caption_column!r}; choose text or title.")
    set_seed(args.seed)
    items = ItemPictures(data.items())
    pictures: Sequence[Image.Image] = items
    texts = data.titles if caption_column == "title" else data.texts
    captions = [texts[row] for row in items.rows.tolist()]
    training, held_out = split_pairs(captions, args.held_out_fraction, args.seed)
    if encoder is None:
        encoder = DualEncoder.from_captions([captions[index] for index in training], **sizes)
        # Larger than the model reads, so that a crop is not blurred.
        image_size = encoder.model.config.vision_config.image_size
        pictures = shrink(pictures, round(image_size / SMALLEST_CROP), args.disable_tqdm)
    elif sizes:
        raise ValueError(
            f"{', '.join(sizes)} are sizes of a new CLIP, not of one that is trained further; leave them out."
        )
    return DualEncoderTrainer(
        encoder,
        args,
        train_dataset=CaptionedPictures(captions, pictures, training, augment=True),
        eval_dataset=CaptionedPictures(captions, pictures, held_out),
        callbacks=early_stopping(args),
    )


def split_pairs(captions: list[str], held_out_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the captions that are not empty, drawn for training and for validation."""
    pairs = [index for index, caption in enumerate(captions) if caption.strip()]
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"The prepared dataset has {len(pairs)} items with both text and picture, fewer than the {FEWEST_PAIRS} "
            "that training takes; use a model that is trained already."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    num_held_out = min(max(round(held_out_fraction * len(pairs)), 2), MOST_HELD_OUT_PAIRS)
    return [pairs[index] for index in order[num_held_out:]], [pairs[index] for index in order[:num_held_out]]


class DualEncoderTrainer(HubTrainerMixin, FiniteLossTrainer):
    """
    Trains a dual encoder on pairs with its own contrastive loss, the other pairs of the batch being the negatives, and
    measures retrieval on the pairs of `eval_dataset`. Further arguments are those of [`~transformers.Trainer`].
    """

    stage = "encoder"
    evaluation_name = "held_out"
    can_be_sharded = False

    def __init__(self, encoder: DualEncoder, args: DualEncoderTrainingArguments, **kwargs):
        super().__init__(
            encoder.model,
            args,
            data_collator=self.collate,
            processing_class=encoder.processor,
            compute_metrics=retrieval_metrics,
            **kwargs,
        )
        self.encoder = encoder
        # The loss is a mean over the batch, though forward takes keyword arguments.
        self.model_accepts_loss_kwargs = False

    def save_model(self, *args, **kwargs) -> None:
        with bar_if_slow(self.model.get_memory_footprint()):
            super().save_model(*args, **kwargs)

    def collate(self, pairs: list[tuple[str, Image.Image]]) -> BatchFeature:
        captions, pictures = zip(*pairs)
        return self.encoder.prepare(list(captions), list(pictures))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        whole = model.training and self.accelerator.num_processes > 1
        outputs = model(**inputs, return_loss=not whole)
        loss = self._loss_of_all(outputs) if whole else outputs.loss
        return (loss, outputs) if return_outputs else loss

    def _loss_of_all(self, outputs) -> torch.Tensor:
        """The model's own loss of the pairs of all processes, each of which has as many."""
        texts, images = (torch.cat(all_gather(one)) for one in (outputs.text_embeds, outputs.image_embeds))
        model = self.accelerator.unwrap_model(self.model)
        logits = texts @ images.T * model.logit_scale.exp()
        if "logit_bias" not in dict(model.named_parameters()):
            answers = torch.arange(len(logits), device=logits.device)
            return (nn.functional.cross_entropy(logits, answers) + nn.functional.cross_entropy(logits.T, answers)) / 2
        # SigLIP: each pair by itself, right or wrong.
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -nn.functional.logsigmoid(signs * (logits + model.logit_bias)).sum(-1).mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.inference_mode(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        embeddings = torch.stack([outputs.text_embeds, outputs.image_embeds], dim=1).float()
        # Metrics are only computed where there are labels; the right answer to a text is the picture beside it.
        return loss, embeddings, torch.zeros(len(embeddings), device=embeddings.device)


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    How well pairs, `predictions` `(num_pairs, 2, dimension)` of texts and pictures, find each other in both
    directions, a tie counting against the right answer; `mrr` is the mean reciprocal rank.
    """
    texts, images = torch.from_numpy(prediction.predictions).unbind(dim=1)
    scores = texts @ images.T
    right = scores.diagonal()
    ranks = torch.cat([(scores >= right[:, None]).sum(dim=1), (scores >= right[None, :]).sum(dim=0)])
    return {
        "recall@1": (ranks <= 1).float().mean().item(),
        "recall@10": (ranks <= 10).float().mean().item(),
        "mrr": (1 / ranks).mean().item(),
    }

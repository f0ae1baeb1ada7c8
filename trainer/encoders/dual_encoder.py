"""Dual encoders (CLIP, SigLIP): texts and pictures in one space, by name or trained on the catalogue's own pairs."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoProcessor,
    BatchFeature,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Trainer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..data.images import BadImageError, decode_image
from ..publishing.hub_trainer import HubTrainerMixin
from ..running.arguments import BestEpochTrainingArguments, check_ranges
from .encoding import check_weights, place


SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
HEAD_WIDTH = 32
LARGEST_VOCABULARY = 16384
# Augmentation of training pairs.
DROPPED_WORDS = 0.3
SMALLEST_CROP = 0.9


class ItemPictures(Sequence):
    """
    The pictures of the items that have one, each decoded to RGB when it is asked for.

    Args:
        items (`datasets.Dataset`): `PreparedDataset.items()`.

    Attributes:
        rows (`torch.LongTensor`): `(num_pictures,)` rows of the items in the order of the pictures.

    Raises:
        ValueError: If no item has a picture.
    """

    def __init__(self, items: datasets.Dataset):
        has_picture = items.data.column("image").is_valid().to_numpy() if "image" in items.column_names else []
        self.rows = torch.from_numpy(np.flatnonzero(has_picture) + 1)
        if len(self.rows) == 0:
            raise ValueError(
                "The prepared dataset has no pictures; prepare it from a source that has, or embed another column."
            )
        self._items = items.select_columns(["item_id", "image"]).cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        item = self._items[int(self.rows[index]) - 1]
        return _decode(item["image"]["bytes"], item["item_id"])


def _decode(data: bytes, item_id: str) -> Image.Image:
    try:
        return decode_image(data)
    except BadImageError as error:
        raise ValueError(
            f"The image of item '{item_id}' in the prepared dataset cannot be read ({error}); replace it and run "
            "`mmesid prepare` again, which can also count it as missing."
        ) from error


class DualEncoder:
    """
    A model with `get_text_features` and `get_image_features`, and its processor.

    Args:
        model (`PreTrainedModel`): CLIP, SigLIP, SigLIP2 or a model with the same two methods.
        processor (`ProcessorMixin`): The model's tokenizer and image processor.
    """

    pooling = "projected"

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model = place(model)
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> "DualEncoder":
        """
        Args:
            name_or_path (`str`): A repository on the Hub or a directory.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Precision of the model.
            trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code of the repository may run.

        Raises:
            ValueError: If the model is no dual encoder, or its checkpoint lacks weights.
        """
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        model, loading = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True, **source)
        if not {"get_text_features", "get_image_features"} <= set(dir(type(model))):
            raise ValueError(
                f"'{name_or_path}' is a {type(model).__name__}, which is no dual encoder of texts and pictures; name "
                "a CLIP or SigLIP model, or use --encoder sentence for texts."
            )
        check_weights(name_or_path, loading["missing_keys"])
        return cls(model, AutoProcessor.from_pretrained(name_or_path, **source))

    @classmethod
    def from_captions(
        cls,
        captions: list[str],
        image_size: int = 64,
        patch_size: int = 32,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        projection_dim: int = 128,
        max_text_length: int = 32,
        min_word_frequency: int = 5,
    ) -> "DualEncoder":
        """
        A small untrained CLIP whose tokenizer is trained on the captions.

        Args:
            captions (`list[str]`): Texts that the tokenizer learns from.
            image_size (`int`, *optional*, defaults to 64): Side in pixels of the square that pictures are resized to.
            patch_size (`int`, *optional*, defaults to 32):
                Side in pixels of a patch; divides `image_size`. With few pictures, large patches learn shapes where
                small ones learn little but colours.
            hidden_size (`int`, *optional*, defaults to 128): Width of both transformers, a multiple of 32.
            num_hidden_layers (`int`, *optional*, defaults to 2): Blocks of either transformer.
            projection_dim (`int`, *optional*, defaults to 128): Width of the common space.
            max_text_length (`int`, *optional*, defaults to 32): Tokens a text is cut to, its two ends included.
            min_word_frequency (`int`, *optional*, defaults to 5):
                Occurrences in the captions below which a word is unknown. Rare words name single items: learning them
                by heart teaches nothing that holds for other items.

        Raises:
            ValueError: If the sizes do not divide.
        """
        if image_size % patch_size or hidden_size % HEAD_WIDTH:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, and hidden_size "
                f"{hidden_size} of {HEAD_WIDTH}."
            )
        tokenizer = train_tokenizer(captions, max_text_length, min_word_frequency)
        transformer = {
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": hidden_size // HEAD_WIDTH,
        }
        config = CLIPConfig(
            text_config={
                **transformer,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": max_text_length,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={**transformer, "image_size": image_size, "patch_size": patch_size},
            projection_dim=projection_dim,
        )
        # The whole picture, squeezed into a square: a crop would cut off what tells one product from another.
        image_processor = CLIPImageProcessorPil(size={"height": image_size, "width": image_size}, do_center_crop=False)
        return cls(CLIPModel(config), CLIPProcessor(image_processor, tokenizer))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes model and processor, which `AutoModel`, `AutoProcessor` and [`~DualEncoder.from_pretrained`] load."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def prepare(self, texts: list[str] | None = None, images: list[Image.Image] | None = None) -> BatchFeature:
        """Model inputs for texts, for pictures, or for pairs of both."""
        settings = {}
        if texts is not None:
            length = self.model.config.text_config.max_position_embeddings
            settings = {"padding": "longest", "truncation": True, "max_length": length}
            if self.model.config.model_type.startswith("siglip"):
                # SigLIP reads the last position of a text, whatever it holds, and attends to the padding: it learnt
                # from texts padded to one length, without a mask.
                settings |= {"padding": "max_length", "return_attention_mask": False}
        return self.processor(text=texts, images=images, return_tensors="pt", **settings)

    @torch.inference_mode()
    def embed(self, batch: BatchFeature) -> torch.Tensor:
        """Embeddings of prepared texts, or of prepared pictures, `(batch, dimension)` in float32, on the CPU."""
        self.model.eval()
        get_features = self.model.get_image_features if "pixel_values" in batch else self.model.get_text_features
        features = get_features(**batch.to(self.model.device, self.model.dtype))
        # In remote code the features come as they are.
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        return features.float().cpu()


def train_tokenizer(captions: list[str], max_length: int, min_word_frequency: int = 5) -> PreTrainedTokenizerFast:
    """
    A tokenizer that knows the frequent words of the captions, in lower case and without accents, Chinese characters
    being words of their own; it puts every text between `<bos>` and `<eos>`.

    Args:
        captions (`list[str]`): The texts to learn from.
        max_length (`int`): Tokens a text is cut to, its two ends included.
        min_word_frequency (`int`, *optional*, defaults to 5): A word that is rarer becomes `<unk>`.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=LARGEST_VOCABULARY,
        min_frequency=min_word_frequency,
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=PartialState().is_local_main_process and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(captions, trainer, length=len(captions))
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL_TOKENS)


class CaptionedPictures(torch.utils.data.Dataset):
    """
    Pairs of text and picture. With augmentation, a pair never looks the same twice: words are left out of the text,
    and the picture is cropped and mirrored.

    Args:
        captions (`list[str]`): One text a picture.
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        indices (`list[int]`): The pairs of this set.
        augment (`bool`, *optional*, defaults to `False`): Whether to augment.
    """

    def __init__(
        self, captions: list[str], pictures: Sequence[Image.Image], indices: list[int], augment: bool = False
    ):
        self.captions = captions
        self.pictures = pictures
        self.indices = indices
        self.augment = augment

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


class DualEncoderTrainer(HubTrainerMixin, Trainer):
    """
    Trains a dual encoder on pairs with its own contrastive loss, the other pairs of the batch being the negatives.

    Args:
        encoder (`DualEncoder`): What to train.
        args ([`DualEncoderTrainingArguments`]): The Trainer's arguments.
        train_dataset (`CaptionedPictures`): The pairs to learn from.
        eval_dataset (`CaptionedPictures`): Held-out pairs, on which retrieval is measured.
    """

    stage = "encoder"
    evaluation_name = "held_out"

    def __init__(self, encoder: DualEncoder, args, train_dataset, eval_dataset, **kwargs):
        super().__init__(
            encoder.model,
            args,
            data_collator=self.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=encoder.processor,
            compute_metrics=retrieval_metrics,
            **kwargs,
        )
        self.encoder = encoder
        # The loss is a mean over the batch, though forward takes keyword arguments.
        self.model_accepts_loss_kwargs = False

    def collate(self, pairs: list[tuple[str, Image.Image]]) -> BatchFeature:
        captions, pictures = zip(*pairs)
        return self.encoder.prepare(list(captions), list(pictures))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.inference_mode(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        embeddings = torch.stack([outputs.text_embeds, outputs.image_embeds], dim=1).float()
        # Metrics are only computed where there are labels; the right answer to a text is the picture beside it.
        return loss, embeddings, torch.zeros(len(embeddings), device=embeddings.device)


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    How well pairs find each other, from texts to pictures and back, a tie counting against the right answer.

    Args:
        prediction (`EvalPrediction`): `predictions` of shape `(num_pairs, 2, dimension)`: texts, pictures.

    Returns:
        `dict[str, float]`: `recall@1`, `recall@10` and `mrr`, the mean reciprocal rank, over both directions.
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

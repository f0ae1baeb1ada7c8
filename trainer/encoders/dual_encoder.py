"""Dual encoders (CLIP, SigLIP): texts and pictures in one space, by name or trained on the catalogue's own pairs."""

import os
import sys
from dataclasses import dataclass

import torch
from accelerate import PartialState
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BatchFeature,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_mmesid.checkpoints import bar_if_slow

from .encoding import TransformersEncoder


SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
LARGEST_VOCABULARY = 16384
NUM_HIDDEN_LAYERS = 2
# With few pictures, large patches learn shapes where small ones learn little but colours.
PATCH_SIZE = 32
HEAD_WIDTH = 32


@dataclass(kw_only=True)
class CLIPSizes:
    """
    Sizes of a new CLIP of two layers.

    Args:
        > New CLIP

        image_size (`int`, *optional*, defaults to `64`): Side in pixels of the square that pictures are resized to, a
            multiple of 32, which is the side of a patch.
        hidden_size (`int`, *optional*, defaults to `128`): Width of both transformers and of the embeddings, a
            multiple of 32.
        max_text_length (`int`, *optional*, defaults to `32`): Tokens that a text is cut to, its two ends included.
        min_word_frequency (`int`, *optional*, defaults to `5`): Occurrences of a word in the texts below which it is
            unknown. Rare words name single items: learning them by heart teaches nothing that holds for other items.

    Raises:
        ValueError: If the sizes do not divide.
    """

    image_size: int = 64
    hidden_size: int = 128
    max_text_length: int = 32
    min_word_frequency: int = 5

    def __post_init__(self):
        for name, unit in (("image_size", PATCH_SIZE), ("hidden_size", HEAD_WIDTH)):
            if getattr(self, name) % unit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of {unit}.")


class DualEncoder(TransformersEncoder):
    """
    A model with `get_text_features` and `get_image_features`, and its processor.

    Args:
        model (`PreTrainedModel`): CLIP, SigLIP, SigLIP2 or a model with the same two methods.
        processor (`ProcessorMixin`): The model's tokenizer and image processor.
    """

    model_help = "a CLIP or SigLIP model, or the directory that `mmesid encoder` wrote"
    reads = ("text", "title", "image")
    pooling = "projected"

    @classmethod
    def check_model(cls, name_or_path: str, model: PreTrainedModel) -> None:
        if not {"get_text_features", "get_image_features"} <= set(dir(type(model))):
            raise ValueError(
                f"'{name_or_path}' is a {type(model).__name__}, which is no dual encoder of texts and pictures; name "
                "a CLIP or SigLIP model, or choose the encoder sentence for texts."
            )

    @classmethod
    def from_captions(cls, captions: list[str], **sizes: int) -> "DualEncoder":
        """
        A small untrained CLIP whose tokenizer is trained on the captions.

        Args:
            captions (`list[str]`): Texts that the tokenizer learns from.
            **sizes (`int`): Fields of [`CLIPSizes`].
        """
        size = CLIPSizes(**sizes)
        tokenizer = train_word_tokenizer(captions, size.max_text_length, size.min_word_frequency)
        transformer = {
            "hidden_size": size.hidden_size,
            "intermediate_size": 4 * size.hidden_size,
            "num_hidden_layers": NUM_HIDDEN_LAYERS,
            "num_attention_heads": size.hidden_size // HEAD_WIDTH,
        }
        text = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": size.max_text_length,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        vision = {"image_size": size.image_size, "patch_size": PATCH_SIZE}
        config = CLIPConfig(
            text_config=transformer | text, vision_config=transformer | vision, projection_dim=size.hidden_size
        )
        # The whole picture, squeezed into a square: a crop would cut off what tells one product from another.
        square = {"height": size.image_size, "width": size.image_size}
        image_processor = CLIPImageProcessorPil(size=square, do_center_crop=False)
        return cls(CLIPModel(config), CLIPProcessor(image_processor, tokenizer))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes model and processor, which `AutoModel`, `AutoProcessor` and [`~DualEncoder.from_pretrained`] load."""
        with bar_if_slow(self.model.get_memory_footprint()):
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


def train_word_tokenizer(captions: list[str], max_length: int, min_word_frequency: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the frequent words of the captions, in lower case and without accents, Chinese characters
    being words of their own; it puts every text between `<bos>` and `<eos>`, within `max_length` tokens."""
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

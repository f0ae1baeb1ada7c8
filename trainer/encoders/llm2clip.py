"""
LLM2CLIP (arXiv:2411.04997): a Llama tuned on captions reads the texts, a CLIP vision tower the pictures, and the CLIP
model projects both into one space.

The checkpoints are `microsoft/LLM2CLIP-Openai-L-14-336` (CLIP, with code of its own) and
`microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned` (Llama); pictures are prepared as for
`openai/clip-vit-large-patch14-336`.
"""

from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from .encoding import PretrainedEncoder, load_model, on_device, resolve_revision


# The user's turn of Llama 3's chat template, as the model cards wrap a caption; the tokenizer puts <|begin_of_text|>
# before it.
TEXT_PREFIX = "<|start_header_id|>user<|end_header_id|>\n\n"
TEXT_SUFFIX = "<|eot_id|>"
MAX_TEXT_LENGTH = 512


class LLM2CLIPEncoder(PretrainedEncoder):
    """
    Reads what it is given the models for: texts with a Llama, pictures with an image processor.

    A text is wrapped as a user's turn of Llama 3 and read with bidirectional attention. Its vector is the mean of the
    last states at the text's tokens and the end of the turn, leaving out what stands before the text, which is what
    the model cards' `LLM2Vec(pooling_mode="mean", skip_instruction=True)` computes; then the CLIP model's
    `get_text_features`. Texts of more than 512 tokens, template included, are cut; there the cards lose the end of the
    turn, and this keeps it.

    Args:
        clip (`PreTrainedModel`): The CLIP model.
        llama (`LlamaModel`, *optional*): The model of texts, with bidirectional attention.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): That of the Llama.
        image_processor (`BaseImageProcessor`, *optional*): What prepares pictures for the CLIP model.
    """

    model_help = "for example microsoft/LLM2CLIP-Openai-L-14-336"
    reads = ("text", "title", "image")
    needs = dict.fromkeys(
        ("text", "title"),
        (
            "text_model_name_or_path",
            "the Llama that reads texts, for example microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        ),
    )

    def __init__(
        self,
        clip: PreTrainedModel,
        llama: LlamaModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_processor: BaseImageProcessor | None = None,
    ):
        self.clip: Any = on_device(clip)
        self.llama: Any = None if llama is None else on_device(llama)
        self.tokenizer: Any = tokenizer
        self.image_processor: Any = image_processor
        texts = () if llama is None else ("text", "title")
        self.reads = texts if image_processor is None else (*texts, "image")
        self.pooling = "projected" if llama is None else "mean, bidirectional, projected"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        text_model_name_or_path: str | None = None,
        text_model_revision: str | None = None,
        image_processor_name_or_path: str | None = None,
    ) -> "LLM2CLIPEncoder":
        """
        Args:
            name_or_path, revision, dtype, trust_remote_code: As in [`TransformersEncoder`], of the CLIP model; the
                Llama has the same precision, and its repository's code never runs: the library's Llama is used.
            text_model_name_or_path (`str`, *optional*): The Llama; without it no texts are read.
            text_model_revision (`str`, *optional*): Branch, tag or commit of the Llama's repository.
            image_processor_name_or_path (`str`, *optional*):
                Where the image processor comes from: by default from the CLIP model where there is no Llama, and from
                nowhere where there is one.

        Raises:
            ValueError: If the text model is no Llama, or a checkpoint lacks weights: the CLIP model's does where its
                own code may not run.
        """
        clip = load_model(AutoModel, name_or_path, dtype, revision=revision, trust_remote_code=trust_remote_code)
        llama = tokenizer = image_processor = None
        if text_model_name_or_path is not None:
            tokenizer = AutoTokenizer.from_pretrained(
                text_model_name_or_path, revision=text_model_revision, trust_remote_code=False
            )
            llama = load_llama(text_model_name_or_path, text_model_revision, dtype)
        if image_processor_name_or_path is not None:
            image_processor = AutoImageProcessor.from_pretrained(image_processor_name_or_path, trust_remote_code=False)
        elif llama is None:
            image_processor = AutoImageProcessor.from_pretrained(
                name_or_path, revision=revision, trust_remote_code=False
            )
        return cls(clip, llama, tokenizer, image_processor)

    @classmethod
    def details_of(cls, name_or_path: str, revision: str | None = None, **settings) -> dict:
        details = super().details_of(name_or_path, revision)
        llama = settings.get("text_model_name_or_path")
        if llama is not None:
            llama_revision = resolve_revision(llama, settings.get("text_model_revision"))
            details |= {"text_encoder": llama, "text_encoder_revision": llama_revision}
        return details

    def prepare(self, texts: list[str] | None = None, images: list[Image.Image] | None = None) -> BatchFeature:
        """`pixel_values`, or `input_ids`, `attention_mask` and `pooling_mask`, each `(batch, length)`."""
        if images is not None:
            return self.image_processor(images=images, return_tensors="pt")
        return tokenize(texts or [], self.tokenizer)

    @torch.inference_mode()
    def embed(self, batch: BatchFeature) -> torch.Tensor:
        if "pixel_values" in batch:
            features = self.clip.get_image_features(batch["pixel_values"].to(self.clip.device, self.clip.dtype))
        else:
            batch = batch.to(self.llama.device)
            states = self.llama(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
            features = self.clip.get_text_features(masked_mean(states, batch["pooling_mask"]).to(self.clip.dtype))
        return features.float().cpu()


def load_llama(name_or_path: str, revision: str | None, dtype: torch.dtype) -> LlamaModel:
    """The library's Llama with bidirectional attention, whatever code the repository brings."""
    model_type = LlamaConfig.get_config_dict(name_or_path, revision=revision)[0].get("model_type")
    if model_type != LlamaConfig.model_type:
        raise ValueError(
            f"'{name_or_path}' is a model of the type {model_type} and no Llama; name the Llama that belongs to the "
            "CLIP model as text_model_name_or_path."
        )
    return make_bidirectional(load_model(LlamaModel, name_or_path, dtype, revision=revision))


def make_bidirectional(model: LlamaModel) -> LlamaModel:
    """Lets every token of a Llama see every other one, the later ones too."""
    # Read by `transformers.masking_utils` where a batch is padded, and by the attention kernels where no mask is made.
    model.config.is_causal = False
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.is_causal = False
    return model


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> BatchFeature:
    """Texts in their turn of the chat template, padded on the left: `input_ids`, `attention_mask` (1 at every token of
    the turn) and `pooling_mask` (1 at the text's tokens and the end of the turn), each `(batch, length)` int64."""
    prefix = tokenizer(TEXT_PREFIX)["input_ids"]
    suffix = tokenizer(TEXT_SUFFIX, add_special_tokens=False)["input_ids"]
    bodies = tokenizer(
        [text.strip() for text in texts],
        add_special_tokens=False,
        truncation=True,
        max_length=MAX_TEXT_LENGTH - len(prefix) - len(suffix),
    )["input_ids"]
    # Padding is attended to by nothing: any token will do.
    tokenizer.pad_token = TEXT_SUFFIX
    turns = {"input_ids": [prefix + body + suffix for body in bodies]}
    batch = tokenizer.pad(turns, padding_side="left", return_tensors="pt", verbose=False)
    pooled = torch.tensor([len(body) + len(suffix) for body in bodies])
    from_end = torch.arange(batch["input_ids"].shape[1], 0, -1)
    return BatchFeature({**batch, "pooling_mask": (from_end <= pooled[:, None]).long()})


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `states` `(batch, length, hidden)` where `mask` `(batch, length)` is 1: `(batch, hidden)`."""
    weights = mask[..., None].to(torch.float32)
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)

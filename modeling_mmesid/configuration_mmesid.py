"""Configuration of the MME-SID recommender."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .checkpoints import CheckpointConfig
from .configuration_sasrec import SASRecConfig


class _RegisteredPipelines(dict):
    """The pipelines of a checkpoint where the package is installed, which has registered them: `pipeline(model=...)`
    reads the task in the keys, and finds no code of the checkpoint's own to ask for."""

    def __contains__(self, task) -> bool:
        return False


@strict
class MMESIDConfig(CheckpointConfig):
    r"""
    Configuration of [`MMESIDForSequentialRecommendation`] ([Wang et al., 2025](https://arxiv.org/abs/2509.02017)).

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the decoder that reads the
            histories; a `LlamaConfig` by default.
        base_model_name_or_path (`str`, *optional*): Where the frozen weights of the backbone come from. `None` means
            that the checkpoint holds them.
        base_model_revision (`str`, *optional*): Revision (a commit hash, once loaded from the Hub) of the base model.
        base_model_file (`str`, *optional*): Where the base model is a GGUF file: its name in the repository or folder.
        base_model_digest (`str`, *optional*): Where the base model is a folder: the SHA-256 of its weights, by which
            another model in its place is noticed.
        lora (`dict`, *optional*): Arguments of [`peft.LoraConfig`] for the adapter in the backbone, such as `{"r": 8,
            "lora_alpha": 16}`. `None` trains the backbone in full.
        num_items (`int`, *optional*, defaults to `1`): Number of items; rows 1 to `num_items` are items and row 0 is
            padding.
        modalities (`list[str]`, *optional*, defaults to `[]`): Names of the modalities, in order. Empty for a
            recommender that knows nothing but item IDs.
        embedding_dims (`list[int]`, *optional*, defaults to `[]`): Width of the frozen embedding of each modality.
        num_quantizers (`int`, *optional*, defaults to `4`): Codes in the semantic ID of a modality (residual levels);
            0 for no semantic IDs.
        codebook_size (`int`, *optional*, defaults to `256`): Codes to choose from at each level.
        codebook_dim (`int`, *optional*, defaults to `128`): Width of a code vector. Where it differs from the
            backbone's hidden size a linear map follows the sum of code vectors.
        share_item_table (`bool`, *optional*, defaults to `True`): Whether an item's token is its row of the fused
            table that scores it. `False` is the paper's form: the token is an MLP over projections and codes, and the
            table fuses a score head with the projections.
        use_item_ids (`bool`, *optional*, defaults to `True`): Whether each item has a free vector besides its content.
        use_embeddings (`bool`, *optional*, defaults to `True`): Whether an item's vector reads the embeddings of its
            modalities; `False` leaves it their codes alone.
        fusion_hidden_size (`int`, *optional*, defaults to `16`): Width of the hidden layer that turns an item's
            frequency into fusion weights.
        fuse_by_frequency (`bool`, *optional*, defaults to `True`): Whether the weight of a source depends on how often
            training saw the item. `False` gives each source one weight for all items.
        fusion_temperature (`float`, *optional*, defaults to `1.0`): Temperature of the softmax over sources; the
            published 0.001 makes it a switch.
        item_token_scale (`float`, *optional*): Factor on item vectors where they enter the backbone, not where they
            score. By default `initialize_items` sets the one with which they are as long as the backbone's own word
            vectors, on average. The square root of the hidden size suits a backbone trained from scratch, as in SASRec
            and Gemma.
        token_dropout (`float`, *optional*, defaults to `0.4`): Dropout on the item tokens that enter the backbone.
        output_dropout (`float`, *optional*, defaults to `0.4`): Dropout on the user representations.
        prompt_prefix_ids (`list[int]`, *optional*, defaults to `[]`): Tokens before the items.
        prompt_suffix_ids (`list[int]`, *optional*, defaults to `[]`): Tokens after the items; without any the last
            item's state represents the user.
        similarity_weights (`dict[str, float]`, *optional*, defaults to `{}`): Modalities whose similarity to the
            latest items of the history is added to the score, with its weight.
        similarity_dim (`int`, *optional*, defaults to `256`): Principal directions of an embedding that similarity
            compares.
        similarity_decay (`float`, *optional*, defaults to `0.7`): How much less an item of the history counts than the
            one after it.
        sasrec_config (`SASRecConfig` or `dict`, *optional*): Configuration of a SASRec whose score is added, too;
            `None` for none.
        sasrec_weight (`float`, *optional*, defaults to `0.3`): Weight of its score.
        max_history (`int`, *optional*, defaults to `50`): Longest history that is read: only the latest items of a
            longer one.
        initializer_range (`float`, *optional*, defaults to `0.02`): Standard deviation of the initial weights.
    """

    model_type = "mmesid"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "sasrec_config": SubConfigSpec(config_class=SASRecConfig, optional=True),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_file: str | None = None
    base_model_digest: str | None = None
    lora: dict[str, Any] | None = None
    num_items: int = 1
    modalities: list[str] | None = None
    embedding_dims: list[int] | None = None
    num_quantizers: int = 4
    codebook_size: int = 256
    codebook_dim: int = 128
    share_item_table: bool = True
    use_item_ids: bool = True
    use_embeddings: bool = True
    fusion_hidden_size: int = 16
    fuse_by_frequency: bool = True
    fusion_temperature: float = 1.0
    item_token_scale: float | None = None
    token_dropout: float = 0.4
    output_dropout: float = 0.4
    prompt_prefix_ids: list[int] | None = None
    prompt_suffix_ids: list[int] | None = None
    similarity_weights: dict[str, float] | None = None
    similarity_dim: int = 256
    similarity_decay: float = 0.7
    sasrec_config: dict | PreTrainedConfig | None = None
    sasrec_weight: float = 0.3
    max_history: int = 50
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in ("modalities", "embedding_dims", "prompt_prefix_ids", "prompt_suffix_ids"):
            if getattr(self, name) is None:
                setattr(self, name, [])
        if self.similarity_weights is None:
            self.similarity_weights = {}
        if "custom_pipelines" in kwargs and not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            kwargs["custom_pipelines"] = _RegisteredPipelines(kwargs["custom_pipelines"])
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        # Where the code that travels with a checkpoint has its pipeline.
        pipeline = {"impl": "pipeline_mmesid.SequentialRecommendationPipeline", "pt": ["AutoModel"]}
        return super().to_dict() | {"custom_pipelines": {"sequential-recommendation": pipeline}}

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's hidden states, of item tokens and of the fused table."""
        return self.get_text_config().hidden_size

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.backbone_config.get_text_config(*args, **kwargs)  # type: ignore[union-attr]

    def validate_architecture(self):
        """Raises a `ValueError` that names the setting if the settings cannot form a model."""
        sizes = "num_items", "embedding_dims", "codebook_size", "codebook_dim", "fusion_hidden_size", "max_history"
        self.require(lambda value: value >= 1, "at least 1", *sizes)
        self.require(lambda value: value >= 0, "0 or more", "num_quantizers")
        self.require(lambda value: 0 <= value < 1, "at least 0 and below 1", "token_dropout", "output_dropout")
        self.require(lambda value: value > 0, "positive", "fusion_temperature")
        self.require(lambda value: value is None or value > 0, "positive", "item_token_scale")
        self.require(lambda value: value >= 1, "at least 1", "similarity_dim")
        self.require(lambda value: 0 <= value <= 1, "at least 0 and at most 1", "similarity_decay")
        self.require(lambda value: value >= 0, "0 or more", "sasrec_weight")
        for name, weight in self.similarity_weights.items():
            if name not in self.modalities or not 0 <= weight < math.inf:
                raise ValueError(
                    f"similarity_weights are {self.similarity_weights}; give a weight, 0 or more, to modalities among "
                    f"{self.modalities}."
                )
        if len(self.modalities) != len(self.embedding_dims):
            raise ValueError(
                f"modalities are {self.modalities} but embedding_dims are {self.embedding_dims}; give one width each."
            )
        if not self.modalities and not self.use_item_ids:
            raise ValueError("modalities is empty and use_item_ids false: nothing to tell items apart; set either.")
        if self.modalities and not self.use_embeddings and not (self.num_quantizers and self.share_item_table):
            raise ValueError(
                "use_embeddings is false, and then codes are all that content gives; set num_quantizers above 0 and "
                "share_item_table true, or use_embeddings true."
            )
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities are {self.modalities}; name none twice.")
        for name in self.modalities:
            if name in ("id", "sasrec") or name.endswith("_similarity"):
                raise ValueError(f"A modality is called '{name}', as another part of a score is; rename it.")


__all__ = ["MMESIDConfig"]

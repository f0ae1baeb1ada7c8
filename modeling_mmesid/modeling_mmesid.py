"""The MME-SID recommender: a decoder that reads items as soft tokens and ranks the whole catalogue by one inner
product."""

import inspect
import os
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .checkpoints import (
    HUB_ARGUMENTS,
    SafetensorsMixin,
    require_fit,
    require_public_base_model,
    weight_files,
    weight_names,
)
from .configuration_mmesid import MMESIDConfig
from .loss_catalogue import catalogue_cross_entropy, sampled_cross_entropy
from .modeling_mmrqvae import MMRQVAEModel
from .packing import pack_histories, packed_attention_mask, packed_block_mask, prepend_prompt, use_attention
from .pipeline_mmesid import SequentialRecommendationPipeline
from .recommendation import RecommendationMixin, SequentialRecommendationOutput


# Items of a large catalogue whose vectors are computed at a time: a few hundred MiB at most for wide embeddings.
ITEMS_PER_BLOCK = 2**15


# Known items whose codes tell whether a quantizer is the model's, and the share of their codes that must agree: of a
# stranger's one in `codebook_size` does.
QUANTIZER_PROBES = 64
MINIMUM_AGREEMENT = 0.3

# What checkpoints of 0.1.0 lack, all of it.
ADDED_BUFFERS = {"items.has_id", "items.removed", "items.fusion.log_range"}


class MMESIDModality(nn.Module):
    """
    One modality of every item: the frozen embedding, projected, and the semantic ID, embedded by trainable code
    vectors.

    The frozen embeddings are centred and scaled to a mean norm of one, which a projection with bias could learn but
    would take long to.
    """

    def __init__(self, config: MMESIDConfig, embedding_dim: int):
        super().__init__()
        rows, hidden_size = config.num_items + 1, config.hidden_size
        self.num_quantizers, self.codebook_size = config.num_quantizers, config.codebook_size
        self.register_buffer("embeddings", torch.zeros(rows, embedding_dim))
        self.register_buffer("present", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("center", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(()))
        self.projection = nn.Linear(embedding_dim, hidden_size)
        self.absent_embedding = nn.Parameter(torch.zeros(hidden_size))
        if self.num_quantizers:
            self.register_buffer("codes", torch.zeros(rows, self.num_quantizers, dtype=torch.long))
            self.code_vectors = nn.Parameter(torch.zeros(self.num_quantizers, self.codebook_size, config.codebook_dim))
            self.code_projection = (
                nn.Identity()
                if config.codebook_dim == hidden_size
                else nn.Linear(config.codebook_dim, hidden_size, bias=False)
            )
            self.absent_code = nn.Parameter(torch.zeros(hidden_size))

    def project(self, items: torch.Tensor) -> torch.Tensor:
        """p_m = W_m x_m + b_m of the given rows, `(items, hidden)`; the learnt absent vector where the modality is
        missing."""
        projected = self.projection((self.embeddings[items] - self.center) * self.scale)
        return torch.where(self.present[items, None], projected, self.absent_embedding)

    def embed_codes(self, items: torch.Tensor) -> torch.Tensor:
        """q_m, the sum of the code vectors over levels, of the given rows, `(items, hidden)`; the absent vector where
        missing."""
        return torch.where(self.present[items, None], self.code_projection(self._summed(items)), self.absent_code)

    def _summed(self, items: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(self.num_quantizers, device=items.device) * self.codebook_size
        return nn.functional.embedding_bag(self.codes[items] + offsets, self.code_vectors.flatten(0, 1), mode="sum")

    @torch.no_grad()
    def initialize_codes(self, code_vectors: torch.Tensor, length: float) -> None:
        """
        Starts from trained code vectors, `(levels, codebook_size, codebook_dim)`, such that the distances that they
        keep between the items stay in proportion: all scaled to a mean `length` of what [`embed_codes`] gives, and
        mapped to the model's width by their principal directions, turned at random, where widths differ. Of a wider
        quantizer the directions of least variance go.
        """
        self.code_vectors.copy_(code_vectors)
        items = self.present.nonzero()[:, 0]
        if isinstance(self.code_projection, nn.Linear):
            hidden_size, width = self.code_projection.weight.shape
            total, products = 0, 0
            for block in items.split(ITEMS_PER_BLOCK):
                summed = self._summed(block).double()
                total, products = total + summed.sum(0), products + summed.T @ summed
            covariance = products - torch.outer(total, total) / len(items)
            kept = min(width, hidden_size)
            directions = torch.linalg.eigh(covariance).eigenvectors[:, width - kept :]
            turn = nn.init.orthogonal_(torch.empty(hidden_size, kept, dtype=directions.dtype))
            self.code_projection.weight.copy_(turn.to(directions.device) @ directions.T)
        self.code_vectors.mul_(length / self.embed_codes(items).norm(dim=-1).mean())


class MMESIDFusion(nn.Module):
    r"""
    Weights of an item's sources by how often it was seen in training:
    \\(g_i = \mathrm{softmax}(\mathrm{MLP}(\mathrm{norm}(\log(1 + freq_i))) / temperature)\\).

    The last layer starts at zero, so that all sources start with equal weight. The range that frequencies are
    normalised by is kept: items added later must not shift the weights of the trained ones.
    """

    def __init__(self, config: MMESIDConfig, num_sources: int):
        super().__init__()
        self.temperature = config.fusion_temperature
        self.register_buffer("frequencies", torch.zeros(config.num_items + 1, dtype=torch.long))
        self.register_buffer("log_range", torch.tensor([0.0, 1.0]))
        self.hidden = nn.Linear(1, config.fusion_hidden_size)
        self.output = nn.Linear(config.fusion_hidden_size, num_sources)

    @staticmethod
    def log_range_of(frequencies: torch.Tensor) -> torch.Tensor:
        """Smallest and largest log(1 + freq) of the items, `(2,)`, from frequencies by row."""
        return torch.log1p(torch.stack(frequencies[1:].aminmax()).float())

    def forward(self, items: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """
        Args:
            items (`torch.LongTensor` of shape `(items,)`): Rows.
            present (`torch.BoolTensor` of shape `(items, sources)`): Which sources an item has; the others get no
                weight.

        Returns:
            `torch.FloatTensor` of shape `(items, sources)`, each row summing to one.
        """
        low, high = self.log_range
        normalised = (torch.log1p(self.frequencies[items].float()) - low) / (high - low).clamp(min=1e-6)
        hidden = nn.functional.gelu(self.hidden(normalised[:, None].to(self.hidden.weight.dtype)))
        logits = self.output(hidden) / self.temperature
        return torch.softmax(logits.masked_fill(~present, -torch.inf), dim=-1)


class MMESIDItems(nn.Module):
    """
    What an item is, to the backbone (its token) and to the score (its row of the fused table).

    Shared form: token and table row are the same vector, the fusion of a free ID vector and, per modality, projection
    plus codes. Paper's form: the token is GELU(MLP([p_m, q_m, ...])), the table fuses a score head with the
    projections.
    """

    def __init__(self, config: MMESIDConfig):
        super().__init__()
        self.config = config
        rows, hidden_size = config.num_items + 1, config.hidden_size
        self.modalities = nn.ModuleDict(
            {
                name: MMESIDModality(config, dim)
                for name, dim in zip(config.modalities, config.embedding_dims, strict=True)
            }
        )
        self.has_id_source = config.use_item_ids or not config.share_item_table
        self.id_embeddings = nn.Embedding(rows, hidden_size, padding_idx=0) if self.has_id_source else None
        self.register_buffer("has_id", torch.ones(rows, dtype=torch.bool))
        self.register_buffer("removed", torch.zeros(rows, dtype=torch.bool))
        self.fusion = MMESIDFusion(config, self.has_id_source + len(self.modalities))
        self.token_id_embeddings = None
        if not config.share_item_table:
            self.token_id_embeddings = nn.Embedding(rows, hidden_size, padding_idx=0) if config.use_item_ids else None
            parts = len(self.modalities) * (2 if config.num_quantizers else 1) + config.use_item_ids
            self.token_mlp = nn.Linear(parts * hidden_size, hidden_size)

    def modality_sources(self, items: torch.Tensor) -> torch.Tensor:
        """What every modality puts into the fused table, of shape `(items, modalities, hidden)`: its projection, and
        in the shared form its codes."""
        with_codes = self.config.share_item_table and self.config.num_quantizers > 0
        return torch.stack(
            [
                modality.project(items) + modality.embed_codes(items) if with_codes else modality.project(items)
                for modality in self.modalities.values()
            ],
            dim=1,
        )

    def sources(self, items: torch.Tensor) -> torch.Tensor:
        """What the fused table is made of, of shape `(items, sources, hidden)`: the ID vector (or score head), then
        every modality."""
        sources = [self.id_embeddings(items)[:, None]] if self.has_id_source else []
        return torch.cat(sources + [self.modality_sources(items)] if self.modalities else sources, dim=1)

    def weights(self, items: torch.Tensor) -> torch.Tensor:
        """
        Fusion weights of shape `(items, sources)`, the ID vector (or score head) first, scaled to sum to the number of
        sources: a factor that no ranking sees, without which every source would learn more slowly the more there are.
        What an item lacks (a modality; the ID vector of an item added after training) has weight 0, and the others
        share its part.
        """
        present = [self.has_id[items]] if self.has_id_source else []
        present += [modality.present[items] for modality in self.modalities.values()]
        present = torch.stack(present, dim=1) & (items != 0)[:, None]
        # An item with no source at all (padding) would make the softmax undefined; its vector is zero.
        any_present = present.any(-1, keepdim=True)
        return self.fusion(items, present | ~any_present) * any_present * present.shape[1]

    def _id_weight_and_content(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of the ID vector, `(items, 1)`, and the weighted sum of the modalities, `(items, hidden)`."""
        weights = self.weights(items)
        if not self.modalities:
            return weights, weights.new_zeros(len(items), self.config.hidden_size)
        content = torch.einsum("is,ish->ih", weights[:, self.has_id_source :], self.modality_sources(items))
        return weights[:, :1], content

    def vectors(self, items: torch.Tensor) -> torch.Tensor:
        """Rows of the fused table, `(items, hidden)`: the weighted sum of the sources."""
        id_weight, content = self._id_weight_and_content(items)
        return torch.addcmul(content, id_weight, self.id_embeddings(items)) if self.has_id_source else content

    def table(self) -> torch.Tensor:
        """
        The whole fused table, `(items + 1, hidden)`.

        What a modality computes on the way is many times as large as the table. Beyond `ITEMS_PER_BLOCK` items it is
        computed block by block, and again in the backward pass, so that it is held for one block at a time.
        """
        rows = torch.arange(len(self.has_id), device=self.has_id.device)
        if len(rows) <= ITEMS_PER_BLOCK:
            id_weight, content = self._id_weight_and_content(rows)
        else:
            blocks = [
                checkpoint(self._id_weight_and_content, block, use_reentrant=False, preserve_rng_state=False)
                for block in rows.split(ITEMS_PER_BLOCK)
            ]
            id_weight, content = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return torch.addcmul(content, id_weight, self.id_embeddings.weight) if self.has_id_source else content

    def tokens(self, items: torch.Tensor) -> torch.Tensor:
        """Soft tokens of the given rows, `(items, hidden)`."""
        if self.config.share_item_table:
            return self.vectors(items)
        parts = []
        for modality in self.modalities.values():
            parts.append(modality.project(items))
            if self.config.num_quantizers:
                parts.append(modality.embed_codes(items))
        if self.token_id_embeddings is not None:
            parts.append(self.token_id_embeddings(items) * self.has_id[items, None])
        return nn.functional.gelu(self.token_mlp(torch.cat(parts, dim=-1)))


def tensor_versions(module: nn.Module) -> list[tuple]:
    """Equal as long as no tensor of the module has changed: every write, by an optimizer or by loading, raises a
    tensor's version."""
    return [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in (*module.parameters(), *module.buffers())]


class MMESIDForSequentialRecommendation(RecommendationMixin, SafetensorsMixin, PreTrainedModel):
    """
    Sequential recommendation with a language model over multimodal items and trained semantic IDs.

    A checkpoint with a base model holds the small trained parts and the LoRA adapter (also in `adapter/`, in PEFT's
    own format); the frozen backbone is fetched by name and revision on loading. Without a base model the checkpoint is
    self-contained. `push_to_hub` of a model that was loaded from the directory of a stage, and not changed since,
    publishes what lies there with it: processor, semantic IDs, results and card.

    ```python
    >>> from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor

    >>> model = MMESIDForSequentialRecommendation.from_pretrained("runs/quickstart/recommender")
    >>> processor = MMESIDProcessor.from_pretrained("runs/quickstart/recommender")
    >>> best = model.recommend(processor([["sku000007", "sku000031"]]), top_k=5)
    >>> processor.convert_rows_to_item_ids(best.items)
    ```
    """

    config: MMESIDConfig
    main_input_name = "items"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing = [re.escape(name) for name in ADDED_BUFFERS]
    # The loss is a mean over targets: without this the Trainer would sum it over accumulated batches.
    accepts_loss_kwargs = False
    # What `quantization_config` leaves alone: the backbone alone is large, and some of these layers have two outputs.
    _keep_in_fp32_modules = ["items"]

    def __init__(self, config: MMESIDConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self._item_table: torch.Tensor | None = None
        self._prompt_cache: Cache | None = None
        self.items = MMESIDItems(config)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.backbone = AutoModel.from_config(deepcopy(config.backbone_config)) if backbone is None else backbone
        self.post_init()
        if config.lora is not None:
            # After `post_init`, which would draw the adapter anew and undo its start as a zero. Freezes the rest of
            # the backbone.
            inject_adapter_in_model(LoraConfig(**config.lora), self.backbone)
        elif config.base_model_name_or_path is not None:
            self.backbone.requires_grad_(False)
        if config.base_model_name_or_path is not None:
            # Of the state rather than the parameters: a quantized weight also has the constants to unpack it.
            trained = {name for name, parameter in self.backbone.named_parameters() if parameter.requires_grad}
            self._keys_to_ignore_on_save = {f"backbone.{name}" for name in self.backbone.state_dict().keys() - trained}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # The list above would also turn the codes and masks of a checkpoint that is loaded in fp16 into floats.
        return {}

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, MMESIDModality):
            init.normal_(module.absent_embedding, std=std)
            if module.num_quantizers:
                init.normal_(module.code_vectors, std=std)
                init.normal_(module.absent_code, std=std)
        if isinstance(module, MMESIDFusion):
            init.normal_(module.hidden.weight, std=1.0)
            init.zeros_(module.output.weight)
            # Also for checkpoints of 0.1.0, which lack it: the frequencies are loaded by now.
            init.copy_(module.log_range, module.log_range_of(module.frequencies))
        if isinstance(module, MMESIDItems):
            init.ones_(module.has_id)
            init.zeros_(module.removed)

    @classmethod
    def from_backbone_pretrained(
        cls,
        pretrained_backbone_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        freeze_backbone: bool = False,
        backbone_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "MMESIDForSequentialRecommendation":
        """
        A new recommender around a pretrained decoder. Give it the catalogue with
        [`~MMESIDForSequentialRecommendation.initialize_items`].

        Args:
            pretrained_backbone_name_or_path (`str` or `os.PathLike`): Anything that `AutoModel.from_pretrained` loads.
            revision (`str`, *optional*): Branch, tag or commit of the backbone.
            freeze_backbone (`bool`, *optional*, defaults to `False`): Without `lora`, leave the backbone as it is
                rather than train it in full: only items and fusion learn, and the checkpoint names the base model.
            backbone_kwargs (`dict`, *optional*): Further arguments of `AutoModel.from_pretrained`, such as `dtype`,
                `quantization_config`, `device_map` or `attn_implementation`.
            **config_kwargs: Settings of [`MMESIDConfig`]. With `lora` the backbone is frozen under an adapter and the
                checkpoint names it; without, it is trained in full and saved with the rest.
        """
        backbone_kwargs = backbone_kwargs or {}
        hub_kwargs = {name: backbone_kwargs[name] for name in HUB_ARGUMENTS if name in backbone_kwargs}
        config_file = cached_file(pretrained_backbone_name_or_path, CONFIG_NAME, revision=revision, **hub_kwargs)
        # A branch moves on. Only what came from a Hub has a commit.
        revision = extract_commit_hash(config_file, None) or revision
        backbone = AutoModel.from_pretrained(
            pretrained_backbone_name_or_path, revision=revision, use_safetensors=True, **backbone_kwargs
        )
        if freeze_backbone or config_kwargs.get("lora") is not None:
            config_kwargs["base_model_name_or_path"] = str(pretrained_backbone_name_or_path)
            config_kwargs["base_model_revision"] = revision
        # A copy: nesting a live configuration would reset its attention implementation, silently dropping the causal
        # mask.
        backbone_config = deepcopy(backbone.config)
        # Often a path of this machine, which a checkpoint that is published must not tell.
        backbone_config._name_or_path = ""
        config = MMESIDConfig(backbone_config=backbone_config, **config_kwargs)
        return cls(config, backbone=backbone)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Loads a checkpoint; the frozen backbone of one with a base model is loaded by name, with `dtype`,
        `quantization_config`, `device_map` and `attn_implementation` passed on.

        Raises:
            OSError: If the checkpoint holds no weights in safetensors, or its base model cannot be loaded.
            ValueError: If a trained weight is missing from the checkpoint, or the checkpoint holds one that the model
            does not have.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        with_loading_info = kwargs.pop("output_loading_info", False)
        if config is None:
            config = MMESIDConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if config.base_model_name_or_path is None:
            model, loading = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
            stored = weight_names(pretrained_model_name_or_path, **hub_kwargs)
            require_fit(pretrained_model_name_or_path, _missing_additions(model, stored), ())
            return (model, loading) if with_loading_info else model
        backbone_kwargs = {
            name: kwargs[name]
            for name in (
                "dtype",
                "quantization_config",
                "device_map",
                "attn_implementation",
                "cache_dir",
                "local_files_only",
                "token",
            )
            if name in kwargs
        }
        files = weight_files(pretrained_model_name_or_path, **hub_kwargs)
        try:
            backbone = AutoModel.from_pretrained(
                config.base_model_name_or_path,
                revision=config.base_model_revision,
                use_safetensors=True,
                **backbone_kwargs,
            )
        except OSError as error:
            raise OSError(
                f"'{pretrained_model_name_or_path}' needs its base model '{config.base_model_name_or_path}', which "
                f"cannot be loaded; if its owner asks for it, accept the terms there and `hf auth login`. {error}"
            ) from error
        model = cls(config, backbone=backbone)
        weights = {name: weight for path in files for name, weight in load_file(path).items()}
        keys = model.load_state_dict(weights, strict=False)
        if "items.fusion.log_range" in keys.missing_keys:
            fusion = model.items.fusion
            fusion.log_range.copy_(fusion.log_range_of(fusion.frequencies))
        missing = set(keys.missing_keys) - model._keys_to_ignore_on_save - ADDED_BUFFERS
        missing |= _missing_additions(model, weights)
        require_fit(pretrained_model_name_or_path, missing, keys.unexpected_keys)
        model = model.to(backbone.device).eval()
        nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, nothing) if with_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        merge_backbone: bool = False,
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """
        Saves as [`~transformers.PreTrainedModel.save_pretrained`] does, with the code of the pipeline, and the LoRA
        adapter also to `adapter/` in PEFT's format.

        Args:
            save_directory (`str` or `os.PathLike`): Where to.
            merge_backbone (`bool`, *optional*, defaults to `False`): Write a self-contained checkpoint instead: the
                adapter merged into the backbone, no base model to fetch.
            is_main_process (`bool`, *optional*, defaults to `True`): Whether this process writes what all share.

        Raises:
            ValueError: If `merge_backbone` is asked of a quantized backbone, whose weights cannot hold the sum.
        """
        if merge_backbone and self.config.base_model_name_or_path is not None:
            return self._merged().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self._save_companions(save_directory)

    def prepare_upload(self, directory: str | os.PathLike, repo_id: str) -> None:
        """
        As [`~modeling_mmesid.checkpoints.SafetensorsMixin.prepare_upload`].

        Raises:
            ValueError: If the base model is a folder on this machine.
        """
        require_public_base_model(self.config.base_model_name_or_path)
        # `save_pretrained(push_to_hub=True)` uploads before it returns.
        self._save_companions(directory)
        super().prepare_upload(directory, repo_id)

    def _save_companions(self, save_directory: str | os.PathLike) -> None:
        """Writes the code of the pipeline, and the adapter in PEFT's format."""
        custom_object_save(SequentialRecommendationPipeline, save_directory)
        if self.config.lora is None:
            return
        adapter_dir = os.path.join(save_directory, "adapter")
        adapter_config = LoraConfig(
            **self.config.lora,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.base_model_revision,
            inference_mode=True,
        )
        adapter_config.save_pretrained(adapter_dir)
        weights = get_peft_model_state_dict(self.backbone)
        save_file(
            {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
            os.path.join(adapter_dir, "adapter_model.safetensors"),
            metadata={"format": "pt"},
        )

    @torch.no_grad()
    def _merged(self) -> "MMESIDForSequentialRecommendation":
        """The same model without base model and adapter; its weights are shared with this one where nothing was
        merged."""
        weights = self.state_dict()
        for name, layer in self.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            for key in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[key]
            # A copy: the adapter goes on training in this one.
            merged = deepcopy(layer)
            merged.merge()
            weights |= {f"{name}.{key}": tensor for key, tensor in merged.get_base_layer().state_dict().items()}
        quantized = next(
            (name for name in weights if "quant_state" in name or weights[name].dtype == torch.uint8), None
        )
        if quantized is not None:
            raise ValueError(
                f"The backbone is quantized ('{quantized}'), so nothing can be merged into it; load the checkpoint "
                "without quantization_config and save that with merge_backbone=True."
            )
        config = deepcopy(self.config)
        config.lora = config.base_model_name_or_path = config.base_model_revision = None
        with torch.device("meta"):
            model = type(self)(config)
        model.load_state_dict(weights, assign=True)
        return model

    @torch.no_grad()
    def initialize_items(
        self,
        frequencies: torch.Tensor,
        embeddings: dict[str, torch.Tensor] | None = None,
        present: dict[str, torch.Tensor] | None = None,
        codes: dict[str, torch.Tensor] | None = None,
        code_vectors: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Gives the model its catalogue. All tensors are indexed by row; row 0 is padding.

        Args:
            frequencies (`torch.LongTensor` of shape `(items + 1,)`): How often each item occurs in the training split.
            embeddings (`dict[str, torch.Tensor]`, each of shape `(items + 1, embedding_dim)`): Frozen embeddings by
                modality.
            present (`dict[str, torch.Tensor]`, each of shape `(items + 1,)`, *optional*): Which items have the
                modality; those with a non-zero embedding by default.
            codes (`dict[str, torch.Tensor]`, each of shape `(items + 1, levels)`, *optional*): Semantic IDs.
            code_vectors (`dict[str, torch.Tensor]`, each of shape `(levels, codebook_size, codebook_dim)`,
                *optional*): The quantizer's *trained* code vectors to start from; left at their random initialisation
                by default.

        Raises:
            ValueError: If a table is missing, or its shape or values do not fit the configuration.
        """
        rows = self.config.num_items + 1
        tables = {"embeddings": embeddings or {}, "codes": codes or {}}
        for kind, given in tables.items():
            wanted = self.config.modalities if kind == "embeddings" or self.config.num_quantizers else []
            if sorted(given) != sorted(wanted):
                raise ValueError(
                    f"{kind} are given for {sorted(given)}, but the configuration has {sorted(wanted)}; "
                    "give one table each."
                )
            for name, table in given.items():
                if len(table) != rows:
                    raise ValueError(
                        f"The {kind} of '{name}' have {len(table)} rows for {rows - 1} items; "
                        "row r belongs to item r, row 0 is padding."
                    )
                if not torch.isfinite(table).all():
                    row = int((~torch.isfinite(table)).any(-1).nonzero()[0])
                    raise ValueError(
                        f"The {kind} of '{name}' hold NaN or infinity in row {row}; make the table again."
                    )
        if frequencies.shape != (rows,):
            raise ValueError(
                f"frequencies have shape {tuple(frequencies.shape)} for {rows - 1} items; "
                "give one a row, row 0 is padding."
            )
        self.items.fusion.frequencies.copy_(frequencies)
        self.items.fusion.log_range.copy_(self.items.fusion.log_range_of(frequencies))
        for name, modality in self.items.modalities.items():
            table = embeddings[name].float()
            has = (table != 0).any(-1) if present is None else present[name].clone()
            has[0] = False
            modality.embeddings.copy_(table)
            modality.present.copy_(has)
            modality.center.copy_(table[has].mean(0))
            modality.scale.copy_(1 / (table[has] - modality.center).norm(dim=-1).mean().clamp(min=1e-12))
            if self.config.num_quantizers:
                modality.codes.copy_(codes[name].clamp(min=0))
            if code_vectors is not None:
                # As long as an ID vector, on average: one source must not drown the others before training.
                length = self.config.initializer_range * self.config.hidden_size**0.5
                modality.initialize_codes(code_vectors[name], length)

    @torch.no_grad()
    def add_items(
        self,
        embeddings: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor] | None = None,
        quantizer: MMRQVAEModel | None = None,
    ) -> list[int]:
        """
        Adds items after training: codes from the quantizer, and a score from the modalities that they have. They have
        no ID vector, whose weight goes to the modalities. What the model gives for the other items stays as it is.

        Args:
            embeddings (`dict[str, torch.Tensor]`, each of shape `(new_items, embedding_dim)`): Embeddings by modality,
                from the encoders that the model was trained with. A modality that no new item has may be left out.
            present (`dict[str, torch.Tensor]`, each of shape `(new_items,)`, *optional*): Which items have the
                modality; those with a non-zero embedding by default.
            quantizer ([`MMRQVAEModel`], *optional*): The quantizer that gave the model its codes; needed if the model
                uses any.

        Returns:
            `list[int]`: Rows of the new items. Give the processor their ids in the same order
            ([`~MMESIDProcessor.add_items`]).

        Raises:
            ValueError: If an embedding does not fit, an item has no modality at all, or the quantizer is missing or
            gives the model's own items other codes than they have.
        """
        config, items = self.config, self.items
        self._check_new_embeddings(embeddings)
        if config.num_quantizers and (
            quantizer is None
            or (quantizer.config.num_quantizers, quantizer.config.codebook_size)
            != (config.num_quantizers, config.codebook_size)
        ):
            raise ValueError(
                f"The model's items have {config.num_quantizers} codes of {config.codebook_size}; give the quantizer "
                "that made them as `quantizer`."
            )
        if quantizer is not None and config.num_quantizers:
            self._check_quantizer(quantizer, embeddings)
        count = len(next(iter(embeddings.values())))
        added = {}
        for name, modality in items.modalities.items():
            table = embeddings.get(name, torch.zeros(count, modality.embeddings.shape[1])).to(modality.embeddings)
            has = (table != 0).any(-1) if present is None or name not in present else present[name].to(table.device)
            codes = torch.zeros(count, config.num_quantizers, dtype=torch.long)
            if config.num_quantizers and has.any():
                encoded = quantizer.encode({name: table[has].to(quantizer.device)}).codes[name]
                codes[has.cpu()] = encoded.long().cpu()
            added[name] = {"embeddings": table, "present": has, "codes": codes.to(table.device)}
        without = (~torch.stack([tables["present"] for tables in added.values()]).any(0)).nonzero()[:, 0]
        if len(without):
            raise ValueError(
                f"New item {int(without[0])} has no modality at all, and without training nothing else can score it."
            )
        for name, modality in items.modalities.items():
            for buffer in ("embeddings", "present", "codes")[: 3 if config.num_quantizers else 2]:
                setattr(modality, buffer, torch.cat([getattr(modality, buffer), added[name][buffer]]))
        frequencies = items.fusion.frequencies
        items.fusion.frequencies = torch.cat([frequencies, frequencies.new_zeros(count)])
        items.has_id = torch.cat([items.has_id, items.has_id.new_zeros(count)])
        items.removed = torch.cat([items.removed, items.removed.new_zeros(count)])
        for name in ("id_embeddings", "token_id_embeddings"):
            table = getattr(items, name)
            if table is not None:
                weight = torch.cat([table.weight, table.weight.new_zeros(count, config.hidden_size)])
                setattr(items, name, nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=0))
        first = config.num_items + 1
        config.num_items += count
        self._item_table = None
        return list(range(first, first + count))

    def _check_quantizer(self, quantizer: MMRQVAEModel, modalities: Iterable[str]) -> None:
        """Codes of another training mean other things. Those of known items tell: the quantizer that made them gives
        most again (an ID that was moved to be unique differs, or one that rounded embeddings no longer decide)."""
        for name in modalities:
            known = self.items.modalities[name]
            rows = known.present.nonzero()[:QUANTIZER_PROBES, 0]
            expected = known.codes[rows].cpu()
            found = quantizer.encode({name: known.embeddings[rows].to(quantizer.device)}).codes[name].cpu()
            agreement = (found == expected).double().mean()
            if agreement < MINIMUM_AGREEMENT:
                raise ValueError(
                    f"The quantizer gives the model's own items other codes of '{name}' than they have "
                    f"({agreement:.0%} agree); give the one that the model was trained with."
                )

    def _check_new_embeddings(self, embeddings: dict[str, torch.Tensor]) -> None:
        widths = dict(zip(self.config.modalities, self.config.embedding_dims, strict=True))
        unknown = sorted(set(embeddings) - set(widths))
        if unknown or not embeddings:
            raise ValueError(
                f"embeddings are given for {sorted(embeddings) or 'nothing'}, but items have "
                f"{self.config.modalities or 'nothing but trained ID vectors, so that none can be added'}."
            )
        count = len(next(iter(embeddings.values())))
        for name, table in embeddings.items():
            if table.shape != (count, widths[name]):
                raise ValueError(
                    f"The embeddings of '{name}' have shape {tuple(table.shape)} where {(count, widths[name])} is "
                    "expected; use the encoder that the model was trained with, one row a new item."
                )
            if not torch.isfinite(table).all():
                row = int((~torch.isfinite(table)).any(-1).nonzero()[0])
                raise ValueError(f"The embeddings of '{name}' hold NaN or infinity for new item {row}.")

    @torch.no_grad()
    def remove_items(self, rows: Sequence[int]) -> None:
        """
        Takes items out of every later recommendation. Their rows stay, so that histories that hold them are read as
        before.

        Raises:
            ValueError: If a row is outside the catalogue.
        """
        wrong = next((row for row in rows if not 1 <= row <= self.config.num_items), None)
        if wrong is not None:
            raise ValueError(
                f"Row {wrong} is outside 1..{self.config.num_items}; use the processor to turn item ids into rows."
            )
        self.items.removed[list(rows)] = True

    def item_table(self) -> torch.Tensor:
        """
        The fused table of shape `(items + 1, hidden)`, t_i = S (g_{i,0} w_i + sum_m g_{i,m} (...)) over S sources: the
        score of item i is its inner product with the user representation. Row 0 is padding and zero.

        Without gradients the table of the last call is returned as long as nothing that it is made of has changed; do
        not write to it.
        """
        if torch.is_grad_enabled():
            return self.items.table()
        state = tensor_versions(self.items), torch.is_autocast_enabled(self.device.type)
        if self._item_table is None or self._item_table_state != state:
            self._item_table, self._item_table_state = self.items.table(), state
        return self._item_table

    def train(self, mode: bool = True):
        if mode:
            # Not to be kept beside gradients and optimizer states.
            self._item_table = self._prompt_cache = None
        return super().train(mode)

    def score_contributions(self, user_embeddings: torch.Tensor, items: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Splits scores into what the sources of the items add to them.

        Args:
            user_embeddings (`torch.FloatTensor` of shape `(batch, hidden)`): User representations.
            items (`torch.LongTensor` of shape `(batch, top_k)`): Rows.

        Returns:
            `dict[str, torch.FloatTensor]`, each of shape `(batch, top_k)`: by source, `"id"` (the paper's score head)
            and the modalities; their sum is the score.
        """
        rows = items.flatten()
        weighted = (self.items.weights(rows)[..., None] * self.items.sources(rows)).unflatten(0, items.shape)
        contributions = torch.einsum("bh,bksh->bks", user_embeddings.to(weighted.dtype), weighted)
        names = ["id"] * self.items.has_id_source + self.config.modalities
        return dict(zip(names, contributions.unbind(-1), strict=True))

    @property
    def removed_items(self) -> torch.Tensor:
        """Rows that are read in histories but never recommended, of shape `(items + 1,)` in bool."""
        return self.items.removed

    def forward(
        self,
        input_ids: torch.Tensor,
        items: torch.Tensor,
        labels: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        shared_length: torch.Tensor | None = None,
        copy: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        candidate_log_counts: torch.Tensor | None = None,
        shared_prompt: bool = False,
    ) -> SequentialRecommendationOutput:
        """
        Takes what [`~modeling_mmesid.packing.pack_histories`] returns; all of shape `(batch, length)` unless said
        otherwise.

        Args:
            input_ids (`torch.LongTensor`): Prompt tokens, 0 at items and padding.
            items (`torch.LongTensor`): Item rows, 0 at tokens and padding.
            labels (`torch.LongTensor`, *optional*): Target row where a user is read, -100 elsewhere.
            lengths (`torch.LongTensor` of shape `(batch,)`, *optional*): Without labels, positions of each sequence:
                the user is read at the last.
            position_ids (`torch.LongTensor`, *optional*): Positions of a packed sequence.
            shared_length (`torch.LongTensor`, *optional*): How many leading positions each position of a packed
                sequence sees.
            copy (`torch.LongTensor`, *optional*): Copy of the closing tokens that each position of a packed sequence
                belongs to.
            candidates (`torch.LongTensor` of shape `(candidates,)`, *optional*): Rows sampled from the catalogue; the
                loss is then estimated from them, and no table of all items is built.
            candidate_log_counts (`torch.FloatTensor` of shape `(candidates,)`, *optional*): Logarithm of how often
                each candidate is expected among the draws.
            shared_prompt (`bool`, *optional*, defaults to `False`): The inputs were packed without the prompt's
                prefix, which all users share: it is run once, in front of the whole batch.
        """
        shared_prompt = shared_prompt and len(self.config.prompt_prefix_ids) > 0
        if shared_prompt and self._recomputes_layers():
            # Recomputed layers keep no keys and values.
            input_ids, items, labels, lengths, position_ids, shared_length, copy = prepend_prompt(
                self.config.prompt_prefix_ids, input_ids, items, labels, lengths, position_ids, shared_length, copy
            )
            shared_prompt = False
        if labels is None:
            table, index = None, items
        elif candidates is None:
            table, index = self.item_table(), items
        else:
            # Only the rows of the table that this batch needs.
            answers = labels[labels != -100]
            rows, positions = torch.cat([items.flatten(), answers, candidates]).unique(return_inverse=True)
            index, answers, sampled = positions.split([items.numel(), len(answers), len(candidates)])
            table, index = self.items.vectors(rows), index.view_as(items)
        if table is not None and self.config.share_item_table:
            item_tokens = nn.functional.embedding(index, table)
        else:
            unique, inverse = items.unique(return_inverse=True)
            item_tokens = nn.functional.embedding(inverse, self.items.tokens(unique))
        hidden_states = self._read(input_ids, items, item_tokens, position_ids, shared_length, copy, shared_prompt)
        if labels is None:
            user_embeddings = hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
            return SequentialRecommendationOutput(user_embeddings=user_embeddings)
        user_embeddings = self.output_dropout(hidden_states[labels != -100].to(table.dtype))
        if candidates is None:
            loss = catalogue_cross_entropy(user_embeddings, table, labels[labels != -100])
        else:
            loss = sampled_cross_entropy(
                user_embeddings,
                table[answers],
                table[sampled],
                candidate_log_counts,
                is_target=answers[:, None] == sampled[None, :],
            )
        return SequentialRecommendationOutput(loss=loss, user_embeddings=user_embeddings)

    def _recomputes_layers(self) -> bool:
        return self.training and any(
            layer.gradient_checkpointing
            for layer in self.backbone.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        )

    def _read(
        self,
        input_ids: torch.Tensor,
        items: torch.Tensor,
        item_tokens: torch.Tensor,
        position_ids: torch.Tensor | None,
        shared_length: torch.Tensor | None,
        copy: torch.Tensor | None,
        behind_prompt: bool,
    ) -> torch.Tensor:
        """The backbone's hidden states, `(batch, length, hidden)`, of what [`forward`] takes, with `item_tokens` of
        shape `(batch, length, hidden)`."""
        word_embeddings = self.backbone.get_input_embeddings()(input_ids)
        item_tokens = self.token_dropout(item_tokens * self.config.item_token_scale).to(word_embeddings.dtype)
        prompt_length = len(self.config.prompt_prefix_ids) if behind_prompt else 0
        # Padding is on the right, where no causal query looks.
        return self.backbone(
            inputs_embeds=torch.where((items != 0)[..., None], item_tokens, word_embeddings),
            attention_mask=None
            if copy is None
            else self._packed_mask(shared_length, copy, prompt_length, word_embeddings.dtype),
            position_ids=None if position_ids is None else position_ids + prompt_length,
            past_key_values=self._prompt_cache_for(len(items)) if behind_prompt else None,
            use_cache=behind_prompt,
        ).last_hidden_state

    def _packed_mask(self, shared_length: torch.Tensor, copy: torch.Tensor, prompt_length: int, dtype: torch.dtype):
        if self.backbone.config._attn_implementation == "flex_attention":
            return packed_block_mask(shared_length, copy, prompt_length)
        visible = packed_attention_mask(shared_length, copy, prompt_length)
        # Additive, which eager attention and SDPA both take.
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    def _prompt_states(self) -> Cache:
        """Keys and values of the prompt before the items, of one user."""
        prefix = torch.tensor([self.config.prompt_prefix_ids], device=self.device)
        # By embedding, so that a backbone that scales tokens but not vectors does the same as behind the prompt.
        embedded = self.backbone.get_input_embeddings()(prefix)
        return self.backbone(inputs_embeds=embedded, use_cache=True).past_key_values

    def _prompt_cache_for(self, batch_size: int) -> Cache:
        """The same for `batch_size` users; without gradients it is computed again only after the backbone has
        changed."""
        if torch.is_grad_enabled() or self.training:
            cache = self._prompt_states()
        else:
            state = (
                tuple(self.config.prompt_prefix_ids),
                tensor_versions(self.backbone),
                torch.is_autocast_enabled(self.device.type),
            )
            if self._prompt_cache is None or self._prompt_cache_state != state:
                self._prompt_cache, self._prompt_cache_state = self._prompt_states(), state
            # A copy: the backbone appends to what it is given.
            cache = deepcopy(self._prompt_cache)
        cache.batch_repeat_interleave(batch_size)
        return cache

    def packing_problem(self) -> str | None:
        """
        Why the prefixes of a user cannot share a sequence on this backbone, or `None` if they can.

        What its attention makes of the mask is not read off its name but tried, on one short history.
        """
        config = self.config.get_text_config()
        longest = len(self.config.prompt_prefix_ids) + self.config.max_history + len(self.config.prompt_suffix_ids)
        window = getattr(config, "sliding_window", None)
        if window is not None and window < longest:
            return f"its sliding window of {window} positions is shorter than prompt and history ({longest})"
        if "position_ids" not in inspect.signature(self.backbone.forward).parameters:
            return "it takes no position_ids"
        was_training = self.training
        self.eval()
        difference = self._difference(self._trial([3], packed=True), self._trial([3], packed=False))
        self.train(was_training)
        return None if difference is None else f"{difference} between packed and single prefixes"

    def attention_problem(self, attn_implementation: str) -> str | None:
        """
        Why another attention, such as `"flex_attention"`, cannot stand in for the backbone's own in training on packed
        prefixes, or `None` if it can.

        It is tried, on two batches of unlike shape, the first as long as a history may be: it must run (and compile)
        forward and backward and give the same states and gradients.
        """
        was_training, devices = self.training, [self.device] if self.device.type == "cuda" else []
        self.train()
        try:
            with torch.random.fork_rng(devices):
                for lengths in ([self.config.max_history, 2], [3, 2, 1]):
                    trials = []
                    for name in (attn_implementation, self.backbone.config._attn_implementation):
                        # The same dropout.
                        torch.manual_seed(0)
                        with use_attention(self.backbone, name):
                            trials.append(self._trial(lengths, packed=True))
                    difference = self._difference(*trials)
                    if difference is not None:
                        return difference
        except Exception as error:  # What does not compile may raise anything.
            reason = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {reason}"
        finally:
            self.train(was_training)
        return None

    def _trial(self, lengths: Sequence[int], packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the backbone makes of a batch of users with so many items: the states at the end of every prefix, `(sum of
        lengths, hidden)`, and the gradient that they send to the items, `(longest, hidden)`.
        """
        histories = [list(range(1, length + 1)) for length in lengths]
        inputs = pack_histories(histories, (), self.config.prompt_suffix_ids or [0], histories, packed=packed)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        # Vectors as the backbone knows them, from all over the vocabulary but for its ends, where special tokens are.
        last_word = self.config.get_text_config().vocab_size - 1
        words = torch.linspace(0, last_word, max(lengths) + 2, device=self.device)[1:-1].long()
        with torch.enable_grad():
            vectors = self.backbone.get_input_embeddings()(words).detach() / self.config.item_token_scale
            vectors.requires_grad_()
            states = self._read(
                inputs["input_ids"],
                inputs["items"],
                nn.functional.embedding((inputs["items"] - 1).clamp(min=0), vectors),
                inputs.get("position_ids"),
                inputs.get("shared_length"),
                inputs.get("copy"),
                behind_prompt=len(self.config.prompt_prefix_ids) > 0,
            )[inputs["labels"] != -100]
            # Of half the dimensions: over all of them a normalised state sums to a constant.
            (gradient,) = torch.autograd.grad(states[:, ::2].sum(), vectors)
        return states.detach().float(), gradient.float()

    def _difference(self, found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> str | None:
        """What of two trials differs by more than rounding, or `None` if nothing does."""
        full = self.backbone.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        # A wrong mask changes a state by tens of per cent, TF32 by a tenth of one, half precision by one or two.
        tolerance = 0.01 if full else 0.1
        for name, one, other in zip(("states", "gradients"), found, expected, strict=True):
            # The worst row, so that one wrong prefix among many is not averaged away.
            difference = (one - other).norm(dim=-1).max() / other.norm(dim=-1).mean()
            if not difference < tolerance:
                return f"its {name} differ by {difference:.1%}"
        return None

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """User representations of shape `(batch, hidden)`, each from the latest `max_history` items of a history."""
        latest = [history[-self.config.max_history :] for history in histories]
        inputs = pack_histories(latest, (), self.config.prompt_suffix_ids)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self(**inputs, shared_prompt=True).user_embeddings


def _missing_additions(model: MMESIDForSequentialRecommendation, stored: Iterable[str]) -> set[str]:
    """Of what 0.1.0 did not know, what a checkpoint lacks that does hold another part of it."""
    added = ADDED_BUFFERS & set(model.state_dict())
    missing = added - set(stored)
    return missing if missing != added else set()


__all__ = ["MMESIDForSequentialRecommendation"]

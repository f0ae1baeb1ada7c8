"""The MME-SID recommender: a decoder that reads items as soft tokens and ranks the whole catalogue by one inner
product."""

import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from .calibration_mmesid import MEASURED_ITEMS, MMESIDUserHead, log_scale_for_spread, mean_length, random_histories
from .checkpointing_mmesid import BaseModelMixin
from .checkpoints import SafetensorsMixin
from .configuration_mmesid import MMESIDConfig
from .items_mmesid import MMESIDFusion, MMESIDItems, MMESIDModality
from .loss_catalogue import catalogue_cross_entropy, sampled_cross_entropy
from .modeling_mmrqvae import MMRQVAEModel
from .packing import pack_histories, packed_attention_mask, packed_block_mask, prepend_prompt
from .recommendation import RecommendationMixin, SequentialRecommendationOutput, evaluating, require_rows
from .scorers_mmesid import MMESIDScorers


# What decoders call their keys and values: `cache` from transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MMESIDPreTrainedModel(BaseModelMixin, SafetensorsMixin, PreTrainedModel):
    config: MMESIDConfig
    base_model_prefix = "model"
    main_input_name = "items"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The loss is a mean over targets: without this the Trainer would sum it over accumulated batches.
    accepts_loss_kwargs = False
    # What `quantization_config` leaves alone: only the backbone is large, and some of these layers have two outputs.
    _keep_in_fp32_modules = ["items", "model.items", "user_head", "model.user_head", "scorers"]
    # Whether a training runs the prompt before the items once for all users of a batch. Sharded layers cannot: between
    # the prompt and the items they would let go of the weights that the gradient of its keys and values needs.
    shares_prompt = True
    # What `kept_until_changed` gave last, and the state of what it was made of.
    _kept: tuple | None = None

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # Items stay in float32 as they do beside a base model. The list above would also turn their codes and masks
        # into floats.
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        floating = (name for name, tensor in tensors if tensor.is_floating_point())
        return {name: torch.float32 for name in floating if name.startswith(tuple(self._keep_in_fp32_modules))}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the decoder; items are in float32."""
        return self.base_model.backbone.dtype

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MMESIDModality):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, MMESIDFusion):
            init.normal_(module.hidden.weight, std=1.0)
            init.zeros_(module.output.weight)
        elif isinstance(module, MMESIDItems):
            init.zeros_(module.removed)
        elif isinstance(module, MMESIDUserHead):
            init.zeros_(module.log_scale)

    def kept_until_changed(self, compute: Callable, modules: Sequence[nn.Module], *settings):
        """
        The result of `compute`, which reads modules and settings. Without gradients it is computed again only after
        one of these has changed: a write to a tensor (not to its `.data`) raises its version. Tensors of inference
        mode have none.
        """
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if torch.is_grad_enabled() or self.training or any(tensor.is_inference() for tensor in tensors):
            return compute()
        versions = [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape) for tensor in tensors]
        state = settings, versions, torch.is_autocast_enabled(self.device.type)
        if self._kept is None or self._kept[1] != state:
            self._kept = compute(), state
        return self._kept[0]

    def train(self, mode: bool = True):
        if mode:
            # Not to be held beside gradients and optimizer states.
            self._kept = None
        return super().train(mode)


class MMESIDModel(MMESIDPreTrainedModel):
    """
    Items and decoder: reads histories of soft item tokens and returns the decoder's hidden states, without scores.

    Args:
        config ([`MMESIDConfig`]): Its configuration.
        backbone ([`~transformers.PreTrainedModel`], *optional*): A decoder that is loaded already; by default one with
            random weights is made from `config.backbone_config`. With `config.lora` an adapter is injected into it and
            the rest is frozen.
    """

    def __init__(self, config: MMESIDConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.items = MMESIDItems(config)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.user_head = MMESIDUserHead()
        self.backbone = AutoModel.from_config(deepcopy(config.backbone_config)) if backbone is None else backbone
        if config.lora is not None:
            inject_adapter_in_model(LoraConfig(**config.lora), self.backbone)
            for parameter in self.backbone.parameters():
                # The `post_init` of this model and of those around it would draw the adapter anew.
                parameter._is_hf_initialized = True
                if parameter.requires_grad:
                    # In bf16, as its decoder may be, small steps of the optimizer would be rounded away.
                    parameter.data = parameter.data.float()
        elif config.base_model_name_or_path is not None:
            self.backbone.requires_grad_(False)
        if config.base_model_name_or_path is not None:
            # The state, not only the parameters: a quantized weight also has the constants to unpack it.
            trained = {name for name, parameter in self.backbone.named_parameters() if parameter.requires_grad}
            self._keys_to_ignore_on_save = {f"backbone.{name}" for name in self.backbone.state_dict().keys() - trained}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word vectors."""
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        items: torch.Tensor,
        item_tokens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        shared_length: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """
        The hidden states of what [`~modeling_mmesid.packing.pack_histories`] returns. The prompt before the items,
        which all users share, is run once in front of the whole batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Prompt tokens, 0 at items and padding.
            items (`torch.LongTensor` of shape `(batch, length)`): Item rows, 0 at tokens and padding.
            item_tokens (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*): Soft tokens of the items;
                computed from the rows by default.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions of a packed sequence.
            shared_length (`torch.LongTensor` of shape `(batch, length)`, *optional*): How many leading positions each
                position of a packed sequence sees.
            segment_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): The copy of the closing tokens
                that each position of a packed sequence belongs to.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutput`] with `last_hidden_state` of shape `(batch, length,
            hidden)`; states at padding are undefined.
        """
        if item_tokens is None:
            unique, inverse = items.unique(return_inverse=True)
            item_tokens = nn.functional.embedding(inverse, self.items.tokens(unique))
        words = self.backbone.get_input_embeddings()(input_ids)
        item_tokens = self.token_dropout(item_tokens * (self.config.item_token_scale or 1.0)).to(words.dtype)
        inputs_embeds = torch.where((items != 0)[..., None], item_tokens, words)  # (batch, length, hidden)
        prompt_length = len(self.config.prompt_prefix_ids)
        cache, skipped = None, 0
        if prompt_length and self.training and (self.backbone.is_activation_checkpointing or not self.shares_prompt):
            # Recomputed layers keep no keys and values: the prompt stands in every row.
            prompt = self._prompt_embeddings().expand(len(items), -1, -1)
            inputs_embeds = torch.cat([prompt, inputs_embeds], dim=1)
            if segment_ids is not None:
                packing = position_ids, shared_length, segment_ids
                position_ids, shared_length, segment_ids = prepend_prompt(prompt_length, *packing)
            prompt_length, skipped = 0, prompt_length
        elif prompt_length:
            cache = self._prompt_cache(len(items))
        # Padding is on the right, where no causal query looks: a sequence that is not packed needs no mask.
        mask = None
        if segment_ids is not None:
            mask = self._packed_mask(shared_length, segment_ids, prompt_length, words.dtype)
        output = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=None if position_ids is None else position_ids + prompt_length,
            use_cache=cache is not None,
            **{CACHE_NAME: cache},
        )
        return BaseModelOutput(last_hidden_state=output.last_hidden_state[:, skipped:])

    def _packed_mask(
        self, shared_length: torch.Tensor, segment_ids: torch.Tensor, prompt_length: int, dtype: torch.dtype
    ):
        if self.backbone.config._attn_implementation == "flex_attention":
            return packed_block_mask(shared_length, segment_ids, prompt_length)
        visible = packed_attention_mask(shared_length, segment_ids, prompt_length)
        # Additive, which eager attention and SDPA both take.
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    def _prompt_embeddings(self) -> torch.Tensor:
        """The prompt before the items, `(1, prompt, hidden)`, by embedding, so that a backbone that scales tokens but
        not vectors does the same as behind the prompt."""
        prefix = torch.tensor([self.config.prompt_prefix_ids], device=self.device)
        return self.backbone.get_input_embeddings()(prefix)

    def _prompt_states(self) -> Cache:
        return self.backbone(inputs_embeds=self._prompt_embeddings(), use_cache=True)[CACHE_NAME]

    def _prompt_cache(self, batch_size: int) -> Cache:
        """Keys and values of the prompt before the items, for `batch_size` users."""
        cache = self.kept_until_changed(self._prompt_states, [self.backbone], tuple(self.config.prompt_prefix_ids))
        if not torch.is_grad_enabled():
            # A copy, for the backbone appends to what it is given.
            cache = deepcopy(cache)
        cache.batch_repeat_interleave(batch_size)
        return cache


class MMESIDForSequentialRecommendation(RecommendationMixin, MMESIDPreTrainedModel):
    """
    Sequential recommendation with a language model over multimodal items and trained semantic IDs: the states of
    [`MMESIDModel`] are scored against every item of the catalogue.

    A checkpoint with a base model holds the small trained parts and the LoRA adapter (also in `adapter/`, in PEFT's
    own format); the frozen backbone is fetched by name and revision on loading. Without a base model the checkpoint is
    self-contained.

    ```python
    >>> from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor

    >>> model = MMESIDForSequentialRecommendation.from_pretrained("runs/quickstart/recommender")
    >>> processor = MMESIDProcessor.from_pretrained("runs/quickstart/recommender")
    >>> best = model.recommend(processor([["sku000007", "sku000031"]]), top_k=5)
    >>> processor.convert_rows_to_item_ids(best.items)
    ```
    """

    def __init__(self, config: MMESIDConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = MMESIDModel(config, backbone)
        self.scorers = MMESIDScorers(config)
        # Kept here, for the configuration has a scale once there are items: other items get another.
        self._scales_tokens = config.item_token_scale is None
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.post_init()

    def initialize_items(
        self,
        frequencies: torch.Tensor,
        embeddings: dict[str, torch.Tensor] | None = None,
        present: dict[str, torch.Tensor] | None = None,
        codes: dict[str, torch.Tensor] | None = None,
        code_vectors: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Gives the model its catalogue, and a start that suits its decoder: item tokens as long as the decoder's own
        words where `item_token_scale` is not set, and user vectors of a length at which the loss is about ln N. All
        tables are indexed by row; row 0 is padding.

        Args:
            frequencies (`torch.LongTensor` of shape `(items + 1,)`): How often each item occurs in the training split.
            embeddings (`dict[str, torch.Tensor]`, each of shape `(items + 1, embedding_dim)`): Frozen embeddings for
                each modality. The model keeps a table of its own type and device as it is, without a copy: do not
                change it afterwards.
            present (`dict[str, torch.BoolTensor]`, each of shape `(items + 1,)`, *optional*): Which items have the
                modality; those with a non-zero embedding by default.
            codes (`dict[str, torch.LongTensor]`, each of shape `(items + 1, levels)`, *optional*): Semantic IDs, -1
                for items that lack the modality.
            code_vectors (`dict[str, torch.Tensor]`, each of shape `(levels, codebook_size, codebook_dim)`,
                *optional*): The quantizer's *trained* code vectors to start from; left at their random initialisation
                by default.

        Raises:
            ValueError: If a table is missing or does not fit the configuration, or no item has some modality.
        """
        self.model.items.initialize(frequencies, embeddings, present, codes, code_vectors)
        self.scorers.initialize(self.model.items)
        self._calibrate(frequencies)

    @torch.no_grad()
    def _calibrate(self, frequencies: torch.Tensor) -> None:
        rows = torch.arange(1, self.config.num_items + 1, device=self.device)
        if self._scales_tokens:
            words = self.model.backbone.get_input_embeddings()
            vocabulary = torch.arange(self.config.get_text_config().vocab_size, device=self.device)
            self.config.item_token_scale = mean_length(words, vocabulary) / mean_length(self.model.items.tokens, rows)
        self.model.user_head.log_scale.zero_()
        histories = random_histories(frequencies, self.config.max_history)
        # Of millions of items some tell the spread.
        measured = self.model.items.rows()[:: max(self.config.num_items // MEASURED_ITEMS, 1)]
        with evaluating(self):
            states, *_ = self.parts(self.encode_histories(histories))
            self.model.user_head.log_scale.fill_(log_scale_for_spread(states, self.model.items.vectors(measured)[1:]))

    def add_items(
        self,
        embeddings: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor] | None = None,
        quantizer: MMRQVAEModel | None = None,
    ) -> list[int]:
        """
        Adds items after training: codes from the quantizer, and a score from the modalities that they have. In place
        of ID vectors they have the mean of those of the rarest items, as items of the catalogue that training never
        saw. What the model gives for the other items stays as it is.

        Args:
            embeddings (`dict[str, torch.Tensor]`, each of shape `(new_items, embedding_dim)`): Embeddings for each
                modality, tensors or NumPy arrays, from the encoders that the model was trained with. A modality that
                no new item has may be left out.
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
        return self.model.items.extend(embeddings, present, quantizer)

    def remove_items(self, rows: Sequence[int]) -> None:
        """Takes items, given by their rows, out of every later recommendation. Histories that hold them are read as
        before."""
        require_rows("rows", rows, self.config.num_items)
        self.model.items.removed[list(rows)] = True

    @property
    def removed_items(self) -> torch.Tensor:
        """Rows that are read in histories but never recommended, of shape `(items + 1,)` in bool."""
        return self.model.items.removed

    def item_table(self) -> torch.Tensor:
        """
        What scores items, of shape `(items + 1, width)`: the score of item i is the inner product of its row with the
        user's embedding. Side by side stand the fused table of the decoder, t_i = S (g_{i,0} w_i + sum_m g_{i,m}
        (...)) over S sources, and the tables of [`MMESIDScorers`]. Row 0 is padding and zero.
        Do not write to it: in evaluation without gradients the same tensor is given until the items change.
        """
        modules = [self.model.items, self.scorers]
        return self.kept_until_changed(self._item_table, modules, tuple(self.scorers.widths()))

    def _item_table(self) -> torch.Tensor:
        tables = [self.model.items.table(), *self.scorers.tables(self.model.items)]
        return torch.cat(tables, dim=-1) if len(tables) > 1 else tables[0]

    @property
    def source_names(self) -> list[str]:
        """What a score may be the sum of, as in [`score_contributions`]."""
        return [*self.model.items.source_names, *self.scorers.widths()]

    def parts(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cuts rows of the item table or user embeddings, `(..., width)`, into the decoder's part and those of the
        other scorers."""
        return vectors.split([self.config.hidden_size, *self.scorers.widths().values()], dim=-1)

    def score_contributions(self, user_embeddings: torch.Tensor, items: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores of the rows `items`, `(batch, top_k)`, for `user_embeddings`, `(batch, width)`, in parts that sum to
        them: `"id"` (in the paper's form the score head) and each modality for the decoder, and the scores of
        [`MMESIDScorers`] by their names, such as `"text_similarity"` and `"sasrec"`."""
        rows, own = items.flatten(), self.model.items
        weighted = (own.weights(rows)[..., None] * own.sources(rows)).unflatten(0, items.shape)
        state, *others = self.parts(user_embeddings.to(weighted.dtype))
        contributions = torch.einsum("bh,bksh->bks", state, weighted)
        _, *tables = self.parts(self.item_table())
        added = [torch.einsum("bh,bkh->bk", part, table[items]) for part, table in zip(others, tables, strict=True)]
        return dict(zip(self.source_names, [*contributions.unbind(-1), *added], strict=True))

    def forward(
        self,
        input_ids: torch.Tensor,
        items: torch.Tensor,
        labels: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        shared_length: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        candidate_log_counts: torch.Tensor | None = None,
    ) -> SequentialRecommendationOutput:
        """
        User representations, and with `labels` the loss, of what [`~modeling_mmesid.packing.pack_histories`] returns;
        `input_ids`, `items`, `position_ids`, `shared_length` and `segment_ids` as in [`MMESIDModel`].

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Target row where a user is read, -100
                elsewhere.
            lengths (`torch.LongTensor` of shape `(batch,)`, *optional*): Without labels, positions of each sequence:
                the user is read at the last.
            candidates (`torch.LongTensor` of shape `(candidates,)`, *optional*): Rows sampled from the catalogue; the
                loss is then estimated from them, and no table of all items is built.
            candidate_log_counts (`torch.FloatTensor` of shape `(candidates,)`, *optional*): Logarithm of how often
                each candidate is expected among the draws.
        """
        if labels is None:
            states = self.model(input_ids, items, None, position_ids, shared_length, segment_ids).last_hidden_state
            states = self.model.user_head(states[torch.arange(len(lengths), device=lengths.device), lengths - 1])
            if self.scorers.widths():
                # Of float32, as the table that scores, and that table itself where it is kept: no training needs it.
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    _, *tables = self.parts(self.item_table())
                states = torch.cat([states, *self.scorers.states(items, tables)], dim=-1)
            return SequentialRecommendationOutput(user_embeddings=states)
        # The one thing that a device is waited for in a step.
        labelled = (labels != -100).flatten().nonzero()[:, 0]  # (targets,)
        targets = labels.flatten()[labelled]
        if candidates is None:
            table, index = self.model.items.table(), items
        else:
            # Only the rows of the table that this batch needs.
            rows, positions = torch.cat([items.flatten(), targets, candidates]).unique(return_inverse=True)
            index, answers, sampled = positions.split([items.numel(), len(targets), len(candidates)])
            table, index = self.model.items.vectors(rows), index.view_as(items)
        item_tokens = nn.functional.embedding(index, table) if self.config.share_item_table else None
        output = self.model(input_ids, items, item_tokens, position_ids, shared_length, segment_ids)
        states = output.last_hidden_state.flatten(0, 1)[labelled].to(table.dtype)
        user_embeddings = self.output_dropout(self.model.user_head(states))
        if candidates is None:
            loss = catalogue_cross_entropy(user_embeddings, table, targets)
        else:
            loss = sampled_cross_entropy(
                user_embeddings,
                table[answers],
                table[sampled],
                candidate_log_counts,
                is_target=answers[:, None] == sampled[None, :],
            )
        return SequentialRecommendationOutput(loss=loss, user_embeddings=user_embeddings)

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """User representations of shape `(batch, width)`, each from the latest `max_history` items of a history."""
        latest = [history[-self.config.max_history :] for history in histories]
        inputs = pack_histories(latest, self.config.prompt_suffix_ids)
        return self(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).user_embeddings


__all__ = ["MMESIDForSequentialRecommendation", "MMESIDModel", "MMESIDPreTrainedModel"]

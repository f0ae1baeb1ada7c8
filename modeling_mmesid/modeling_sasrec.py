"""SASRec with the full-catalogue cross-entropy at every position."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoints import SafetensorsMixin
from .configuration_sasrec import SASRecConfig
from .loss_catalogue import catalogue_cross_entropy
from .recommendation import RecommendationMixin, SequentialRecommendationOutput, pad_histories


class SASRecAttention(nn.Module):
    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        dropout = self.dropout if self.training else 0.0
        if last is None:
            query, key, value = map(self._heads, self.qkv_proj(hidden_states).chunk(3, dim=-1))
            # Padding is on the right, where a causal query never looks: no padding mask is needed.
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        else:
            # The same projection in two parts: only keys and values are needed of every position.
            parts = [width, 2 * width]
            to_query, to_rest = self.qkv_proj.weight.split(parts)
            query_bias, rest_bias = self.qkv_proj.bias.split(parts)
            query = self._heads(nn.functional.linear(_at(hidden_states, last), to_query, query_bias))
            rest = nn.functional.linear(hidden_states, to_rest, rest_bias)
            key, value = map(self._heads, rest.chunk(2, dim=-1))
            seen = torch.arange(length, device=last.device) <= last[:, None]
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen[:, None, None], dropout_p=dropout
            )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SASRecLayer(nn.Module):
    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SASRecAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """States of all positions, `(batch, length, hidden)`, or of one position `last` of each row, `(batch,)`, as
        `(batch, 1, hidden)`."""
        attended = self.dropout(self.attention(self.attention_norm(hidden_states), last))
        hidden_states = (hidden_states if last is None else _at(hidden_states, last)) + attended
        feed_forward = self.down_proj(nn.functional.gelu(self.up_proj(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(feed_forward)


def _at(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One position of each row, `(batch, 1, hidden)`."""
    return hidden_states[torch.arange(len(positions), device=positions.device), positions][:, None]


class SASRecPreTrainedModel(SafetensorsMixin, PreTrainedModel):
    config: SASRecConfig
    base_model_prefix = "model"
    main_input_name = "items"
    # The loss is a mean over targets: without this the Trainer would sum it over accumulated batches.
    accepts_loss_kwargs = False


class SASRecModel(SASRecPreTrainedModel):
    """Item and position embeddings, pre-normalised causal blocks, a final normalisation."""

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.item_embeddings = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_history, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> None:
        """None that stand at the input alone: the items' vectors score, too, and FSDP must not part them from that."""
        return None

    def forward(self, items: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            items (`torch.LongTensor` of shape `(batch, length)`): Item rows, oldest first, padded with 0 on the right;
                `length` at most `max_history`.
            last (`torch.LongTensor` of shape `(batch,)`, *optional*): The one position of each row whose state is
                asked for: the last block then computes no other.

        Returns:
            `torch.FloatTensor` of shape `(batch, length, hidden)`, where states at padding are undefined, or with
            `last` of shape `(batch, hidden)`.
        """
        positions = torch.arange(items.shape[1], device=items.device)
        # Scaled up, as in the original, so that what an item is outweighs where it stands.
        item_embeddings = self.item_embeddings(items) * self.config.hidden_size**0.5
        hidden_states = self.dropout(item_embeddings + self.position_embeddings(positions))
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states)
        hidden_states = self.norm(self.layers[-1](hidden_states, last))
        return hidden_states if last is None else hidden_states[:, 0]


class SASRecForSequentialRecommendation(RecommendationMixin, SASRecPreTrainedModel):
    """SASRec that scores every item by the inner product with its own embedding."""

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.model = SASRecModel(config)
        self.post_init()

    def item_table(self) -> torch.Tensor:
        """Item vectors of shape `(items + 1, hidden)`; row 0 is padding."""
        return self.model.item_embeddings.weight

    def score_contributions(self, user_embeddings: torch.Tensor, items: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores of `items`, `(batch, top_k)`, by source: an item is nothing here but its ID vector."""
        return {"id": torch.einsum("bh,bkh->bk", user_embeddings, self.item_table()[items])}

    def forward(self, items: torch.Tensor, labels: torch.Tensor | None = None) -> SequentialRecommendationOutput:
        """
        Args:
            items (`torch.LongTensor` of shape `(batch, length)`): Item rows, oldest first, padded with 0 on the right.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Row of the item that follows each
                position; -100 where nothing is to be predicted.
        """
        if labels is None:
            return SequentialRecommendationOutput(user_embeddings=self.model(items, (items != 0).sum(-1) - 1))
        hidden_states = self.model(items)
        # The one thing that a device is waited for in a step.
        labelled = (labels != -100).flatten().nonzero()[:, 0]  # (targets,)
        user_embeddings = hidden_states.flatten(0, 1)[labelled]
        loss = catalogue_cross_entropy(user_embeddings, self.item_table(), labels.flatten()[labelled])
        return SequentialRecommendationOutput(loss=loss, user_embeddings=user_embeddings)

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """User representations of shape `(batch, hidden)`, each from the latest `max_history` items of a history."""
        latest = [history[-self.config.max_history :] for history in histories]
        return self(items=pad_histories(latest, self.device)).user_embeddings


__all__ = ["SASRecModel", "SASRecForSequentialRecommendation"]

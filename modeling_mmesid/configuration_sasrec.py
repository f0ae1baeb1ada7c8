"""Configuration of SASRec."""

from huggingface_hub.dataclasses import strict

from .checkpoints import CheckpointConfig


@strict
class SASRecConfig(CheckpointConfig):
    r"""
    Configuration of [`SASRecForSequentialRecommendation`], a causal self-attention encoder over item histories
    ([Kang and McAuley, 2018](https://arxiv.org/abs/1808.09781)).

    Args:
        num_items (`int`, *optional*, defaults to `1`): Number of items; rows 1 to `num_items` are items and row 0 is
            padding.
        hidden_size (`int`, *optional*, defaults to `64`): Width of item embeddings and hidden states.
        num_hidden_layers (`int`, *optional*, defaults to `2`): Number of self-attention blocks.
        num_attention_heads (`int`, *optional*, defaults to `2`): Number of attention heads; must divide `hidden_size`.
        intermediate_size (`int`, *optional*): Width of the feed-forward layer; four times `hidden_size` by default.
        max_history (`int`, *optional*, defaults to `50`): Longest history that is read: only the latest
            items of a longer one.
        embedding_dropout (`float`, *optional*, defaults to `0.5`): Dropout on the item embeddings that enter the first
            block.
        hidden_dropout (`float`, *optional*, defaults to `0.5`): Dropout on the output of attention and feed-forward
            layers.
        attention_dropout (`float`, *optional*, defaults to `0.2`): Dropout on attention weights.
        layer_norm_eps (`float`, *optional*, defaults to `1e-8`): Epsilon of the layer normalisations.
        initializer_range (`float`, *optional*, defaults to `0.02`): Standard deviation of the initial weights.
    """

    model_type = "mmesid_sasrec"

    num_items: int = 1
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    max_history: int = 50
    embedding_dropout: float = 0.5
    hidden_dropout: float = 0.5
    attention_dropout: float = 0.2
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises a `ValueError` that names the setting if the sizes cannot form a model."""
        sizes = "num_items", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_history"
        self.require(lambda value: value >= 1, "at least 1", *sizes, "intermediate_size")
        dropouts = "embedding_dropout", "hidden_dropout", "attention_dropout"
        self.require(lambda value: 0 <= value < 1, "at least 0 and below 1", *dropouts)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change either."
            )


__all__ = ["SASRecConfig"]

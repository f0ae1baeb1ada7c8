"""Configuration of the multimodal residual quantizer."""

import keyword
from copy import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import nn

from .checkpoints import CheckpointConfig


# Codes of a level where nothing else is said and the catalogue has enough items.
USUAL_CODEBOOK_SIZE = 256

# The encoders of each objective unless the settings say otherwise. A network without a projection follows the
# distances but loses the spread of the codes.
ENCODERS: dict[str, dict[str, Any]] = {
    "distance": {"encoder_hidden_dims": [512], "encoder_projection": True},
    "paper": {"encoder_hidden_dims": [512, 256], "encoder_projection": False},
    "mse": {"encoder_hidden_dims": [512, 256], "encoder_projection": False},
}


@strict
class MMRQVAEConfig(CheckpointConfig):
    r"""
    Configuration of a [`MMRQVAEModel`]: the shape of its encoders, codebooks and decoders, and the loss that it
    returns.

    Args:
        modalities (`list[str]`, *optional*, defaults to `["collaborative", "text"]`): Names of the modalities, in
            order; the first is the anchor of the alignment. Python identifiers.
        embedding_dims (`list[int]`, *optional*, defaults to 64 for each modality): Width of the embeddings of each
            modality, in the same order.

        > Codes

        num_quantizers (`int`, *optional*, defaults to `4`): Codes of an item in each modality (residual levels).
        codebook_size (`int`, *optional*): Codes that a level chooses from; fewer than there are items. By default
            256, or in a small catalogue the power of two that leaves eight items to each.
        codebook_dim (`int`, *optional*, defaults to `128`): Width of the code vectors; that of the decoder which will
            read them spares a map between the two.
        sinkhorn_epsilons (`list[float]`, *optional*, defaults to 0 for each level): Temperatures of Sinkhorn's
            algorithm, one per level and relative to the mean squared distance, which balance the use of the codes; 0
            leaves a level to the nearest code. The paper balances the last of four: `0 0 0 0.003`.
        resolve_collisions (`bool`, *optional*, defaults to `False`): Make the semantic IDs of a catalogue unique
            within each modality: all but the first of the items that share an ID move to the nearest free one.
        initializer_range (`float`, *optional*, defaults to `0.02`): Standard deviation of code vectors before the
            k-means initialization.

        > Encoder

        encoder_hidden_dims (`list[int]`, *optional*): Widths of the hidden layers of every encoder. Defaults to
            `[512]` for the objective `"distance"` and to `[512, 256]` for the others.
        encoder_projection (`bool`, *optional*): Whether encoders add their output to a fixed orthogonal projection of
            the embedding, which keeps items apart, and decoders are linear; otherwise decoders mirror the encoders.
            Without hidden layers the projection is the whole encoder. Defaults to `True` for the objective
            `"distance"`.

        > Loss

        objective (`str`, *optional*, defaults to `"distance"`): What the quantizer is trained for: `"distance"`, that
            the distances between quantized items follow those between their embeddings; `"paper"`, that the
            reconstructions are distributed as the embeddings are (MMD); `"mse"`, that each reconstruction is near its
            embedding.
        distance_focus (`float`, *optional*, defaults to `1.0`): How much more the distances to near items count in the
            objective `"distance"`; 0 weighs all alike.
        codebook_loss_weight (`float`, *optional*, defaults to `1.0`): Weight of the pull of code vectors to what they
            stand for.
        commitment_loss_weight (`float`, *optional*, defaults to `0.25`): Weight of the pull of latents to their code
            vectors.
        alignment_loss_weight (`float`, *optional*, defaults to `0.01`): Weight of the InfoNCE between the quantized
            anchor and every other quantized modality; 0 leaves it out.
        alignment_temperature (`float`, *optional*, defaults to `0.1`): Temperature of the InfoNCE.
    """

    model_type = "mmrqvae"

    modalities: list[str] | tuple[str, ...] = ("collaborative", "text")
    embedding_dims: list[int] | tuple[int, ...] | None = None
    num_quantizers: int = 4
    codebook_size: int | None = None
    codebook_dim: int = 128
    sinkhorn_epsilons: list[float] | tuple[float, ...] | None = None
    resolve_collisions: bool = False
    initializer_range: float | int = 0.02
    encoder_hidden_dims: list[int] | tuple[int, ...] | None = None
    encoder_projection: bool | None = None
    objective: Literal["distance", "paper", "mse"] = "distance"
    distance_focus: float | int = 1.0
    codebook_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    alignment_loss_weight: float | int = 0.01
    alignment_temperature: float | int = 0.1

    def __post_init__(self, **kwargs):
        if self.embedding_dims is None:
            self.embedding_dims = [64] * len(self.modalities)
        if self.sinkhorn_epsilons is None:
            self.sinkhorn_epsilons = [0.0] * self.num_quantizers
        for name, value in ENCODERS[self.objective].items():
            if getattr(self, name) is None:
                setattr(self, name, copy(value))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises a `ValueError` that names the setting if the settings cannot form a model."""
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(
                f"`modalities` must name at least one modality and none twice, got {list(self.modalities)}."
            )
        for modality in self.modalities:
            # Modules are stored under the name of their modality.
            if not modality.isidentifier() or keyword.iskeyword(modality) or modality in dir(nn.ModuleDict):
                raise ValueError(
                    f"`modalities` holds '{modality}', which cannot name a modality; use another identifier."
                )
        if len(self.embedding_dims) != len(self.modalities):
            raise ValueError(
                f"`embedding_dims` must give one width for each of the modalities {list(self.modalities)}, "
                f"got {list(self.embedding_dims)}."
            )
        sizes = "num_quantizers", "codebook_size", "codebook_dim", "encoder_hidden_dims", "embedding_dims"
        self.require(lambda value: value is None or value > 0, "positive", *sizes, "alignment_temperature")
        weights = "codebook_loss_weight", "commitment_loss_weight", "alignment_loss_weight"
        self.require(lambda value: value >= 0, "0 or more", *weights, "distance_focus")
        if len(self.sinkhorn_epsilons) != self.num_quantizers or min(self.sinkhorn_epsilons) < 0:
            raise ValueError(
                f"`sinkhorn_epsilons` must give one number, 0 or more, for each of the {self.num_quantizers} levels, "
                f"got {list(self.sinkhorn_epsilons)}."
            )


__all__ = ["MMRQVAEConfig"]

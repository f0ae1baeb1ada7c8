"""Configuration of the multimodal residual quantizer."""

import keyword

from huggingface_hub.dataclasses import strict
from torch import nn

from .checkpoints import CheckpointConfig


OBJECTIVES = ("stress", "distance", "paper", "mse", "mmd_mse")
ALIGNMENTS = ("info_nce", "mmd")


@strict
class MMRQVAEConfig(CheckpointConfig):
    r"""
    Configuration of a [`MMRQVAEModel`]: the shape of its encoders, codebooks and decoders, and the loss that it
    returns.

    Args:
        modalities (`list[str]`, *optional*, defaults to `["collaborative", "text", "visual"]`):
            Names of the modalities, in order; the first is the anchor of the alignment. Python identifiers.
        embedding_dims (`list[int]`, *optional*, defaults to `[64, 1280, 1280]`):
            Width of the embeddings of each modality, in the same order.
        num_quantizers (`int`, *optional*, defaults to 4):
            Residual levels, that is codes an item has in one modality.
        codebook_size (`int`, *optional*, defaults to 256):
            Codes a level chooses from.
        codebook_dim (`int`, *optional*, defaults to 128):
            Width of the quantized latent and of every code vector.
        encoder_hidden_dims (`list[int]`, *optional*):
            Widths of the hidden layers of every encoder, and in reverse of every decoder. Defaults to none for the
            objectives `"stress"`, which has no encoder, and `"distance"`: an encoder that follows the distances gives
            up the spread of the codes. Their decoders are linear. Defaults to `[512, 256]` for the others.
        encoder_projection (`bool`, *optional*):
            Whether an encoder adds its output to a fixed orthogonal projection of the embedding, which keeps items
            apart when the quantizer is trained for distances; with an empty `encoder_hidden_dims` it is the projection
            alone. Defaults to whether the objective is `"distance"`.
        objective (`str`, *optional*, defaults to `"stress"`):
            What the quantizer is trained for. `"stress"`: codes and code vectors together make the distances between
            quantized items follow those between their embeddings. `"distance"`: so do the code vectors, and an item
            takes the codes nearest to its embedding, which needs no anchors. `"paper"`: the multi-kernel MMD between
            embeddings and reconstructions. `"mse"`: their mean squared error. `"mmd_mse"`: the sum of both.
        objective_weight (`float`, *optional*, defaults to 3.0):
            Weight of the objective.
        distance_focus (`float`, *optional*, defaults to 0.8):
            How much more the distances to near items count in the objectives `"stress"` and `"distance"`; 0 weighs all
            alike.
        num_anchors (`int`, *optional*, defaults to 16384):
            Items that the checkpoint keeps for the objective `"stress"`, each with its embedding and its codes: other
            items get the codes that keep their distances to these. Not more than there are items.
        codebook_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the squared distance that pulls code vectors towards the residuals they stand for; for the
            objective `"distance"`, their sum towards the latent.
        commitment_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the squared distance that pulls residuals towards their code vectors.
        alignment (`str`, *optional*, defaults to `"info_nce"`):
            Loss between the quantized anchor and every other quantized modality: `"info_nce"` or `"mmd"`.
        alignment_loss_weight (`float`, *optional*, defaults to 0.01):
            Weight of the alignment; 0 leaves it out.
        alignment_temperature (`float`, *optional*, defaults to 0.1):
            Temperature of the InfoNCE.
        sinkhorn_epsilons (`list[float]`, *optional*):
            Balancing of the codes, one temperature a level, relative to the mean squared distance; 0 leaves a level to
            the nearest code. Training finds Sinkhorn's potentials of the codes and the checkpoint keeps them, so that
            an item gets the same code in training, in the export and alone. By default no level is balanced; the paper
            balances the last of four by 0.003.
        resolve_collisions (`bool`, *optional*, defaults to `False`):
            Whether the semantic IDs of a catalogue are made unique within each modality: of the items that share one,
            all but the first move to the nearest ID that is free. [`MMRQVAEModel.encode`], which knows no other items,
            gives the ID before.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of code vectors before the k-means initialisation.
    """

    model_type = "mmrqvae"

    modalities: list[str] | tuple[str, ...] = ("collaborative", "text", "visual")
    embedding_dims: list[int] | tuple[int, ...] = (64, 1280, 1280)
    num_quantizers: int = 4
    codebook_size: int = 256
    codebook_dim: int = 128
    encoder_hidden_dims: list[int] | tuple[int, ...] | None = None
    encoder_projection: bool | None = None
    objective: str = "stress"
    objective_weight: float | int = 3.0
    distance_focus: float | int = 0.8
    num_anchors: int = 16_384
    codebook_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    alignment: str = "info_nce"
    alignment_loss_weight: float | int = 0.01
    alignment_temperature: float | int = 0.1
    sinkhorn_epsilons: list[float] | tuple[float, ...] | None = None
    resolve_collisions: bool = False
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.encoder_hidden_dims is None:
            self.encoder_hidden_dims = [] if self.objective in ("stress", "distance") else [512, 256]
        if self.encoder_projection is None:
            self.encoder_projection = self.objective == "distance"
        if self.sinkhorn_epsilons is None:
            self.sinkhorn_epsilons = [0.0] * self.num_quantizers
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        """Raises `ValueError` with the name of the wrong setting, which a class validator of `@strict` would wrap."""
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
        positive = {
            "num_quantizers": self.num_quantizers,
            "codebook_size": self.codebook_size,
            "codebook_dim": self.codebook_dim,
            "num_anchors": self.num_anchors,
            "encoder_hidden_dims": min(self.encoder_hidden_dims, default=1),
            "embedding_dims": min(self.embedding_dims),
            "alignment_temperature": self.alignment_temperature,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in (
            "objective_weight",
            "distance_focus",
            "codebook_loss_weight",
            "commitment_loss_weight",
            "alignment_loss_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if len(self.sinkhorn_epsilons) != self.num_quantizers or min(self.sinkhorn_epsilons) < 0:
            raise ValueError(
                f"`sinkhorn_epsilons` must give one number, 0 or more, for each of the {self.num_quantizers} levels, "
                f"got {list(self.sinkhorn_epsilons)}."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got '{self.objective}'.")
        if self.objective == "stress":
            for name, set_ in {
                "encoder_hidden_dims": self.encoder_hidden_dims,
                "encoder_projection": self.encoder_projection,
                "sinkhorn_epsilons": any(self.sinkhorn_epsilons),
            }.items():
                if set_:
                    raise ValueError(
                        f"`{name}` does not go with the objective 'stress', which searches for codes without an "
                        "encoder; leave it out, or choose another objective."
                    )
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"`alignment` must be one of {', '.join(ALIGNMENTS)}, got '{self.alignment}'.")


__all__ = ["MMRQVAEConfig"]

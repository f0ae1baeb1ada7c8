"""MM-RQ-VAE: one residual quantizer per modality, whose codes are the semantic ID of an item."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .checkpoints import SafetensorsMixin
from .configuration_mmrqvae import USUAL_CODEBOOK_SIZE, MMRQVAEConfig
from .loss_mmrqvae import distance_correlation_loss, info_nce, mean_squared_error, mmd, pairwise_squared_distances


# lambda_recon of the paper (arXiv:2509.02017), the weight of its objective; the other objectives take it over.
OBJECTIVE_WEIGHT = 3.0


@dataclass
class MMRQVAEEncoderOutput(ModelOutput):
    """
    Args:
        codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` for each modality): Semantic IDs.
        quantized (`dict[str, torch.FloatTensor]` of shape `(batch_size, codebook_dim)` for each modality): Sums of the
            code vectors.
    """

    codes: dict[str, torch.Tensor] | None = None
    quantized: dict[str, torch.Tensor] | None = None


@dataclass
class MMRQVAEOutput(ModelOutput):
    """
    The losses are scalars, each summed over the modalities.

    Args:
        loss (`torch.FloatTensor`): The weighted sum of the losses below.
        objective_loss (`torch.FloatTensor`): What `config.objective` asks for.
        decoding_loss (`torch.FloatTensor`): Mean squared error of reconstructions that train nothing but the decoder,
            for the objective `"distance"`; 0 for the others.
        codebook_loss (`torch.FloatTensor`): Squared distance of code vectors to (constant) residuals, mean over
            levels; for the objective `"distance"` of their sum to the (constant) latent.
        commitment_loss (`torch.FloatTensor`): The same, but it is the code vectors that are constant.
        alignment_loss (`torch.FloatTensor`): InfoNCE between the anchor and every other quantized modality.
        codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` for each modality): Semantic IDs.
            Codes of an item that lacks the modality mean nothing.
        quantized (`dict[str, torch.FloatTensor]` of shape `(batch_size, codebook_dim)` for each modality): Sums of the
            code vectors.
        reconstructions (`dict[str, torch.FloatTensor]` of shape `(batch_size, embedding_dim)` for each modality): What
            the decoders make of the quantized vectors, in the space of the embeddings.
    """

    loss: torch.Tensor | None = None
    objective_loss: torch.Tensor | None = None
    decoding_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    codes: dict[str, torch.Tensor] | None = None
    quantized: dict[str, torch.Tensor] | None = None
    reconstructions: dict[str, torch.Tensor] | None = None


class MMRQVAEVectorQuantization(nn.Module):
    """One level: chooses the nearest of its code vectors, in squared distance minus the code's `offset`."""

    def __init__(self, config: MMRQVAEConfig):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        # What balances the codes; 0 where the level is not balanced.
        self.register_buffer("offsets", torch.zeros(config.codebook_size))

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The nearest code is searched in full precision, under autocast, too.
        with torch.autocast(hidden_states.device.type, enabled=False):
            # (batch_size, codebook_size)
            costs = pairwise_squared_distances(hidden_states.float(), self.codebook.float()) - self.offsets.float()
        return costs.argmin(-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(codes, self.codebook)


class MMRQVAEResidualVectorQuantizer(nn.Module):
    """A stack of levels, each of which quantizes what the levels before it left."""

    def __init__(self, config: MMRQVAEConfig):
        super().__init__()
        self.layers = nn.ModuleList([MMRQVAEVectorQuantization(config) for _ in range(config.num_quantizers)])

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Codes `(batch_size, num_quantizers)` of `hidden_states` `(batch_size, codebook_dim)`."""
        residual, codes = hidden_states, []
        for layer in self.layers:
            codes.append(layer.encode(residual))
            residual = residual - layer.decode(codes[-1])
        return torch.stack(codes, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum `(batch_size, codebook_dim)` of the vectors that `codes` `(batch_size, num_quantizers)` choose."""
        return sum(layer.decode(codes[:, level]) for level, layer in enumerate(self.layers))

    def losses(self, latents: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over levels of the squared distances that pull code vectors to residuals, and residuals to code
        vectors."""
        residual, codebook, commitment = latents, [], []
        for level, layer in enumerate(self.layers):
            vectors = layer.decode(codes[:, level])
            codebook.append(mean_squared_error(vectors, residual.detach()))
            commitment.append(mean_squared_error(residual, vectors.detach()))
            residual = residual - vectors.detach()
        return torch.stack(codebook).mean(), torch.stack(commitment).mean()


class MMRQVAEEncoder(nn.Module):
    """A network, a fixed orthogonal projection, or the sum of both."""

    def __init__(self, config: MMRQVAEConfig, embedding_dim: int):
        super().__init__()
        hidden_dims = config.encoder_hidden_dims
        has_network = hidden_dims or not config.encoder_projection
        self.network = _mlp([embedding_dim, *hidden_dims, config.codebook_dim]) if has_network else None
        # A buffer, for `from_pretrained` would make a parameter trainable.
        projection = torch.empty(config.codebook_dim, embedding_dim) if config.encoder_projection else None
        self.register_buffer("projection", projection)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Latents `(batch_size, codebook_dim)` of standardized embeddings `(batch_size, embedding_dim)`."""
        if self.projection is None:
            return self.network(inputs)
        latents = nn.functional.linear(inputs, self.projection)
        return latents if self.network is None else latents + self.network(inputs)


class MMRQVAEBranch(nn.Module):
    """Encoder, codebooks and decoder of one modality, and the losses that train them for the objective."""

    def __init__(self, config: MMRQVAEConfig, embedding_dim: int):
        super().__init__()
        self.config = config
        self.quantizer = MMRQVAEResidualVectorQuantizer(config)
        hidden_dims = () if config.encoder_projection else config.encoder_hidden_dims
        self.decoder = _mlp([config.codebook_dim, *hidden_dims[::-1], embedding_dim])
        self.encoder = MMRQVAEEncoder(config, embedding_dim)
        # Embeddings are shifted and scaled as a whole, which keeps their distances in proportion.
        self.register_buffer("input_mean", torch.zeros(embedding_dim))
        self.register_buffer("input_scale", torch.ones(()))

    def standardize(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings.to(self.input_mean.dtype) - self.input_mean) / self.input_scale

    def latents(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What is quantized, `(batch_size, codebook_dim)`, of `embeddings` `(batch_size, embedding_dim)`."""
        return self.encoder(self.standardize(embeddings))

    def encode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Codes `(batch_size, num_quantizers)` of `embeddings` `(batch_size, embedding_dim)`."""
        return self.quantizer.encode(self.latents(embeddings))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch_size, embedding_dim)` that `codes` `(batch_size, num_quantizers)` stand for."""
        return self._unstandardize(self.decoder(self.quantizer.decode(codes)))

    def forward(
        self, embeddings: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Codes, quantized vectors, reconstructions `(batch_size, embedding_dim)`, and the losses by their names in
        [`MMRQVAEOutput`], in which only `rows` `(present,)` take part, the items that have the modality."""
        inputs = self.standardize(embeddings)  # (batch_size, embedding_dim)
        latents = self.encoder(inputs)  # (batch_size, codebook_dim)
        codes = self.quantizer.encode(latents)  # (batch_size, num_quantizers)
        objectives: dict[str, Callable] = {
            "distance": self._follow_distances,
            "paper": partial(self._reconstruct, mmd),
            "mse": partial(self._reconstruct, mean_squared_error),
        }
        quantized, outputs, losses = objectives[self.config.objective](inputs, latents, codes, rows)
        return codes, quantized, self._unstandardize(outputs), losses

    def _follow_distances(self, inputs, latents, codes, rows):
        """Distances between quantized items follow those between their embeddings."""
        vectors = self.quantizer.decode(codes)
        # The gradient reaches the code vectors, and past them the encoder; the decoder only reads.
        quantized = vectors + (latents - latents.detach())
        outputs = self.decoder(vectors.detach())
        losses = {
            "objective_loss": distance_correlation_loss(inputs[rows], quantized[rows], self.config.distance_focus),
            "decoding_loss": mean_squared_error(outputs[rows], inputs[rows]),
            # Distances leave the scale open: code vectors that outgrow the latents leave no residuals.
            "codebook_loss": mean_squared_error(vectors[rows], latents[rows].detach()),
            "commitment_loss": mean_squared_error(latents[rows], vectors[rows].detach()),
        }
        return quantized, outputs, losses

    def _reconstruct(self, reconstruction_loss, inputs, latents, codes, rows):
        """Reconstructions follow the embeddings; the gradient passes straight through the codes to the encoder."""
        quantized = latents + (self.quantizer.decode(codes) - latents).detach()
        outputs = self.decoder(quantized)
        codebook_loss, commitment_loss = self.quantizer.losses(latents[rows], codes[rows])
        losses = {
            "objective_loss": reconstruction_loss(outputs[rows], inputs[rows]),
            "decoding_loss": torch.zeros_like(codebook_loss),
            "codebook_loss": codebook_loss,
            "commitment_loss": commitment_loss,
        }
        return quantized, outputs, losses

    def _unstandardize(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs * self.input_scale + self.input_mean


def _mlp(widths: list[int]) -> nn.Sequential:
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class MMRQVAEPreTrainedModel(SafetensorsMixin, PreTrainedModel):
    config: MMRQVAEConfig
    base_model_prefix = "mmrqvae"
    main_input_name = "embeddings"
    # Rounded embeddings and code vectors would give other codes.
    _keep_in_fp32_modules_strict = ["codebook", "decoder", "encoder", "input_mean", "input_scale", "offsets"]
    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps itself.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.orthogonal_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MMRQVAEVectorQuantization):
            init.normal_(module.codebook, std=self.config.initializer_range)
            init.zeros_(module.offsets)
        elif isinstance(module, MMRQVAEEncoder) and module.projection is not None:
            init.orthogonal_(module.projection)
            if module.network is not None:
                # Nothing is added to the projection until training finds what.
                init.zeros_(module.network[-1].weight)
        elif isinstance(module, MMRQVAEBranch):
            init.zeros_(module.input_mean)
            init.ones_(module.input_scale)


class MMRQVAEModel(MMRQVAEPreTrainedModel):
    r"""
    Turns the embeddings of items into semantic IDs: `num_quantizers` codes for each modality.

    For every modality an encoder makes a latent, each level of a stack of codebooks quantizes what the levels before
    it left, and a decoder leads back. The modalities meet in the alignment loss alone, so that an item may lack any of
    them.

    ```python
    >>> model = MMRQVAEModel.from_pretrained("quantizer")
    >>> output = model.encode({"text": embeddings})  # (batch_size, embedding_dim)
    >>> output.codes["text"]  # (batch_size, num_quantizers)
    >>> model.decode(output.codes)["text"]  # (batch_size, embedding_dim)
    ```
    """

    def __init__(self, config: MMRQVAEConfig):
        if config.codebook_size is None:
            # Made without a catalogue to go by.
            config.codebook_size = USUAL_CODEBOOK_SIZE
        super().__init__(config)
        self.branches = nn.ModuleDict(
            {name: MMRQVAEBranch(config, width) for name, width in zip(config.modalities, config.embedding_dims)}
        )
        self.post_init()

    def code_vectors(self, modality: str) -> torch.Tensor:
        """The code vectors of one modality, `(num_quantizers, codebook_size, codebook_dim)`."""
        return torch.stack([layer.codebook for layer in self._branch(modality).quantizer.layers])

    def encode(self, embeddings: dict[str, torch.Tensor]) -> MMRQVAEEncoderOutput:
        """
        Semantic IDs of items, from embeddings `(batch_size, embedding_dim)` of any of the modalities; raises a
        `ValueError` if a modality is unknown, a shape does not fit, or an embedding is not finite. The IDs of a whole
        catalogue may differ where `config.resolve_collisions` made them unique.
        """
        codes = {name: self.branches[name].encode(values) for name, values in self._checked(embeddings).items()}
        quantized = {name: self.branches[name].quantizer.decode(values) for name, values in codes.items()}
        return MMRQVAEEncoderOutput(codes=codes, quantized=quantized)

    def decode(self, codes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings `(batch_size, embedding_dim)` that codes `(batch_size, num_quantizers)` of each modality stand
        for; raises a `ValueError` if a modality is unknown or its codes have another shape or range."""
        for modality, values in codes.items():
            self._branch(modality)
            levels, size = self.config.num_quantizers, self.config.codebook_size
            if values.dim() != 2 or values.shape[1] != levels or not ((values >= 0) & (values < size)).all():
                raise ValueError(
                    f"codes['{modality}'] must have shape (batch_size, {levels}) and lie in 0..{size - 1}, got "
                    f"{tuple(values.shape)}."
                )
        return {name: self.branches[name].decode(values) for name, values in codes.items()}

    def forward(
        self, embeddings: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> MMRQVAEOutput:
        """
        Args:
            embeddings (`dict[str, torch.Tensor]` of shape `(batch_size, embedding_dim)` for each modality): Embeddings
                of the same items.
            present (`dict[str, torch.BoolTensor]` of shape `(batch_size,)` for each modality, *optional*): Which items
                have the modality; all by default. The others take part in no loss.

        Raises:
            ValueError: If a modality is unknown, a shape does not fit, or an embedding is not finite.
        """
        masks, codes, quantized, reconstructions, losses = {}, {}, {}, {}, []
        for name, values in self._checked(embeddings, present).items():
            masks[name] = torch.ones_like(values[:, 0], dtype=torch.bool) if present is None else present[name].bool()
            # Once for all losses: a mask would be searched, and the device waited for, at every use.
            rows = masks[name].nonzero()[:, 0]
            codes[name], quantized[name], reconstructions[name], branch_losses = self.branches[name](values, rows)
            losses.append(branch_losses)
        total = {name: sum(branch_losses[name] for branch_losses in losses) for name in losses[0]}
        total["alignment_loss"] = self._alignment_loss(quantized, masks)
        weights = {
            "objective_loss": OBJECTIVE_WEIGHT,
            "decoding_loss": 1.0,
            "codebook_loss": self.config.codebook_loss_weight,
            "commitment_loss": self.config.commitment_loss_weight,
            "alignment_loss": self.config.alignment_loss_weight,
        }
        loss = sum(weight * total[name] for name, weight in weights.items())
        return MMRQVAEOutput(loss=loss, codes=codes, quantized=quantized, reconstructions=reconstructions, **total)

    def _branch(self, modality: str) -> MMRQVAEBranch:
        if modality not in self.branches:
            raise ValueError(f"Unknown modality '{modality}'; this quantizer has {', '.join(self.config.modalities)}.")
        return self.branches[modality]

    def _checked(
        self, embeddings: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The embeddings in the order of the config, with the rows of items that lack the modality at the mean."""
        for name in embeddings:
            self._branch(name)
        rows = {name: values.shape[0] for name, values in embeddings.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"The embeddings of all modalities must have one row per item, got {rows} rows.")
        names = [name for name in self.config.modalities if name in embeddings]
        return {name: self._checked_rows(name, embeddings[name], present) for name in names}

    def _checked_rows(self, name: str, values: torch.Tensor, present: dict[str, torch.Tensor] | None) -> torch.Tensor:
        mean = self.branches[name].input_mean
        if values.dim() != 2 or values.shape[1] != len(mean):
            raise ValueError(
                f"embeddings['{name}'] must have shape (batch_size, {len(mean)}), got {tuple(values.shape)}."
            )
        if present is not None:
            if name not in present or present[name].shape != values.shape[:1]:
                raise ValueError(f"present['{name}'] must be given with shape ({len(values)},), one value per item.")
            values = torch.where(present[name].bool()[:, None], values, mean.to(values.dtype))
        finite = values.isfinite().all(-1)
        if not finite.all():
            raise ValueError(
                f"embeddings['{name}'] holds NaN or infinity, first in row {int(finite.long().argmin())} of the batch."
            )
        return values

    def _alignment_loss(self, quantized: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = next(iter(quantized.values())).new_zeros((), dtype=torch.float32)
        # In the order of the config: what is left of it begins with the anchor, or has none.
        anchor, *others = quantized
        if self.config.alignment_loss_weight == 0 or anchor != self.config.modalities[0]:
            return loss
        for name in others:
            both = (masks[anchor] & masks[name]).nonzero()[:, 0]
            loss = loss + info_nce(quantized[anchor][both], quantized[name][both], self.config.alignment_temperature)
        return loss


__all__ = [
    "MMRQVAEEncoderOutput",
    "MMRQVAEModel",
    "MMRQVAEOutput",
    "MMRQVAEPreTrainedModel",
]

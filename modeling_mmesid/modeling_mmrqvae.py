"""MM-RQ-VAE: one residual quantizer a modality, whose codes are an item's semantic ID."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .checkpoints import SafetensorsMixin
from .code_search import nearest_anchors, search_codes
from .configuration_mmrqvae import MMRQVAEConfig
from .loss_mmrqvae import distance_correlation_loss, info_nce, mmd, pairwise_squared_distances, stress_loss


# A new item tries the codes of so many nearest anchors, and goes on from the best with so many passes over the levels.
# Its stress is measured to no more than so many anchors, the first: more change little, and cost as much more.
SEARCH_STARTS = 4
SEARCH_SWEEPS = 2
SEARCH_ANCHORS = 4_096


@dataclass
class MMRQVAEEncoderOutput(ModelOutput):
    """
    Args:
        codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` a modality):
            Semantic IDs. Codes of an item that lacks the modality mean nothing.
        quantized (`dict[str, torch.FloatTensor]` of shape `(batch_size, codebook_dim)` a modality):
            Sums of the code vectors.
    """

    codes: dict[str, torch.LongTensor] | None = None
    quantized: dict[str, torch.FloatTensor] | None = None


@dataclass
class MMRQVAEOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            The weighted sum of the losses below.
        objective_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            `config.objective`, summed over the modalities.
        decoding_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            Mean squared error of reconstructions that train the decoder alone, for the objectives `"stress"` and
            `"distance"`; 0 for the others.
        codebook_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            Squared distance of code vectors to (constant) residuals, mean over levels, summed over the modalities; for
            the objective `"distance"` of their sum to the (constant) latent; 0 for `"stress"`, which has no latents.
        commitment_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            Squared distance of residuals to (constant) code vectors, mean over levels, summed over the modalities; for
            the objective `"distance"` of the latent to the (constant) sum of its code vectors; 0 for `"stress"`.
        alignment_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`):
            Alignment of the anchor with every other modality, summed.
        codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` a modality):
            Semantic IDs.
        quantized (`dict[str, torch.FloatTensor]` of shape `(batch_size, codebook_dim)` a modality):
            Sums of the code vectors.
        reconstructions (`dict[str, torch.FloatTensor]` of shape `(batch_size, embedding_dim)` a modality):
            What the decoders make of the quantized vectors, in the space of the embeddings.
    """

    loss: torch.FloatTensor | None = None
    objective_loss: torch.FloatTensor | None = None
    decoding_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    alignment_loss: torch.FloatTensor | None = None
    codes: dict[str, torch.LongTensor] | None = None
    quantized: dict[str, torch.FloatTensor] | None = None
    reconstructions: dict[str, torch.FloatTensor] | None = None


class MMRQVAEVectorQuantization(nn.Module):
    """One level: chooses the nearest of its code vectors, in squared distance minus the code's `offset`."""

    def __init__(self, config: MMRQVAEConfig):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        # What balances the codes; 0 where the level is not balanced.
        self.register_buffer("offsets", torch.zeros(config.codebook_size))

    def encode(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        # A code must not depend on whether it was assigned under autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.costs(hidden_states).argmin(-1)

    def costs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What each code costs each row of `hidden_states`, `(batch_size, codebook_size)`."""
        return pairwise_squared_distances(hidden_states.float(), self.codebook.float()) - self.offsets.float()

    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        return nn.functional.embedding(codes, self.codebook)


class MMRQVAEResidualVectorQuantizer(nn.Module):
    """A stack of levels, each of which quantizes what the levels before it left."""

    def __init__(self, config: MMRQVAEConfig):
        super().__init__()
        self.layers = nn.ModuleList([MMRQVAEVectorQuantization(config) for _ in range(config.num_quantizers)])

    def encode(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        """Codes `(batch_size, num_quantizers)` of `hidden_states` `(batch_size, codebook_dim)`."""
        residual, codes = hidden_states, []
        for layer in self.layers:
            codes.append(layer.encode(residual))
            residual = residual - layer.decode(codes[-1])
        return torch.stack(codes, -1)

    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Sum `(batch_size, codebook_dim)` of the vectors that `codes` `(batch_size, num_quantizers)` choose."""
        return sum(layer.decode(codes[:, level]) for level, layer in enumerate(self.layers))


class MMRQVAEBranch(nn.Module):
    """Codebooks and decoder of one modality; how an embedding gets its codes is the subclasses' part."""

    def __init__(self, config: MMRQVAEConfig, embedding_dim: int, decoder_hidden_dims: list[int]):
        super().__init__()
        self.quantizer = MMRQVAEResidualVectorQuantizer(config)
        self.decoder = _mlp([config.codebook_dim, *decoder_hidden_dims, embedding_dim])
        # Embeddings are shifted and scaled as a whole, which keeps their distances in proportion.
        self.register_buffer("input_mean", torch.zeros(embedding_dim))
        self.register_buffer("input_scale", torch.ones(()))

    def standardize(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings.to(self.input_mean.dtype) - self.input_mean) / self.input_scale

    def encode(self, embeddings: torch.Tensor) -> torch.LongTensor:
        """Codes `(batch_size, num_quantizers)` of embeddings as they come."""
        raise NotImplementedError

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.decoder(quantized) * self.input_scale + self.input_mean


class MMRQVAEEncoderBranch(MMRQVAEBranch):
    """An encoder makes the latent, and every level takes the code nearest to what the levels before it left."""

    def __init__(self, config: MMRQVAEConfig, embedding_dim: int):
        hidden_dims = list(config.encoder_hidden_dims)
        super().__init__(config, embedding_dim, [] if config.encoder_projection else hidden_dims[::-1])
        self.has_network = bool(hidden_dims) or not config.encoder_projection
        if self.has_network:
            self.encoder = _mlp([embedding_dim, *hidden_dims, config.codebook_dim])
        self.projects = config.encoder_projection
        if self.projects:
            # A buffer, for `from_pretrained` would make a parameter trainable.
            self.register_buffer("projection", torch.empty(config.codebook_dim, embedding_dim))

    def latents(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is quantized, `(batch_size, codebook_dim)`, of standardized embeddings."""
        if not self.projects:
            return self.encoder(inputs)
        projected = nn.functional.linear(inputs, self.projection)
        return projected + self.encoder(inputs) if self.has_network else projected

    def encode(self, embeddings: torch.Tensor) -> torch.LongTensor:
        return self.quantizer.encode(self.latents(self.standardize(embeddings)))


class MMRQVAEAnchorBranch(MMRQVAEBranch):
    """
    Takes the codes whose distances to the anchors, items that are kept with their codes, follow those of the
    embedding. There is no encoder, which could give up the spread of the codes.
    """

    def __init__(self, config: MMRQVAEConfig, embedding_dim: int):
        super().__init__(config, embedding_dim, [])
        self.focus = config.distance_focus
        # Embeddings are scaled to a variance of 1 a dimension of the code vectors, and the offset is in that unit, so
        # that one learning rate serves every width.
        self.width = config.codebook_dim
        self.offset = nn.Parameter(torch.zeros(()))
        # In the order drawn: the first ones are a sample of all.
        self.register_buffer("anchors", torch.empty(config.num_anchors, embedding_dim))
        self.register_buffer("anchor_codes", torch.empty(config.num_anchors, config.num_quantizers, dtype=torch.long))

    def encode(self, embeddings: torch.Tensor) -> torch.LongTensor:
        inputs = self.standardize(embeddings)
        nearest = nearest_anchors(inputs, self.anchors, SEARCH_STARTS)
        codes, stress = self.search(inputs, self.anchor_codes[nearest[:, 0]])
        # An anchor starts from its own codes alone: others may leave less stress, but they are not those that the code
        # vectors were trained with.
        new = (self.anchors[nearest[:, 0]] != inputs).any(1).nonzero()[:, 0]
        for start in nearest[new].T[1:]:
            found, left = self.search(inputs[new], self.anchor_codes[start])
            better = left < stress[new]
            codes[new] = torch.where(better[:, None], found, codes[new])
            stress[new] = torch.where(better, left, stress[new])
        return self.search(inputs, codes, sweeps=SEARCH_SWEEPS)[0]

    def search(
        self, inputs: torch.Tensor, start: torch.LongTensor, anchors: torch.LongTensor | None = None, sweeps: int = 1
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        [`~code_search.search_codes`] of standardized embeddings with this branch's code vectors and anchors.

        Args:
            inputs (`torch.Tensor` of shape `(batch_size, embedding_dim)`): Standardized embeddings.
            start (`torch.LongTensor` of shape `(batch_size, num_quantizers)`): Codes to start from.
            anchors (`torch.LongTensor`, *optional*): The anchors to measure the stress to; the first 4,096 by default.
            sweeps (`int`, *optional*, defaults to 1): Passes over the levels.

        Returns:
            `tuple[torch.LongTensor, torch.Tensor]`: Codes `(batch_size, num_quantizers)` and the stress that they
            leave, `(batch_size,)`.
        """
        if anchors is None:
            anchors = torch.arange(min(len(self.anchors), SEARCH_ANCHORS), device=inputs.device)
        vectors = self.quantizer.decode(self.anchor_codes[anchors])
        codebooks = torch.stack([layer.codebook for layer in self.quantizer.layers])
        return search_codes(
            inputs, start, self.anchors[anchors], vectors, codebooks, self.stress_offset, self.focus, sweeps
        )

    @property
    def stress_offset(self) -> torch.Tensor:
        """What quantization takes from every squared distance."""
        return self.offset * self.width


def _mlp(widths: list[int]) -> nn.Sequential:
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class MMRQVAEPreTrainedModel(SafetensorsMixin, PreTrainedModel):
    config: MMRQVAEConfig
    base_model_prefix = "mmrqvae"
    main_input_name = "embeddings"
    # What checkpoints of 0.1.0 lack, whose levels are not balanced.
    _keys_to_ignore_on_load_missing = [r"quantizer\.layers\.\d+\.offsets$"]
    # Rounded embeddings and code vectors would give other codes. All but `anchor_codes`: integers would be cast
    # too.
    _keep_in_fp32_modules_strict = [
        "anchors",
        "codebook",
        "decoder",
        "encoder",
        "input_mean",
        "input_scale",
        "offset",
        "offsets",
        "projection",
    ]
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
        elif isinstance(module, MMRQVAEBranch):
            init.zeros_(module.input_mean)
            init.ones_(module.input_scale)
            if isinstance(module, MMRQVAEAnchorBranch):
                init.zeros_(module.offset)
                init.zeros_(module.anchors)
                init.zeros_(module.anchor_codes)
            elif module.projects:
                init.orthogonal_(module.projection)
                if module.has_network:
                    # Nothing is added to the projection until training finds what.
                    init.zeros_(module.encoder[-1].weight)


class MMRQVAEModel(MMRQVAEPreTrainedModel):
    r"""
    Turns an item's embeddings into semantic IDs: `num_quantizers` codes a modality.

    Every modality has a stack of codebooks and a decoder. For the objective `"stress"` an item takes the codes whose
    distances to other items follow those of its embedding; for the others an encoder makes a latent, and each level
    quantizes what the levels before it left. The modalities meet in the alignment loss alone, so that an item may lack
    any of them.

    Example:

    ```python
    >>> model = MMRQVAEModel.from_pretrained("quantizer")
    >>> output = model.encode({"text": embeddings})  # (batch_size, embedding_dim)
    >>> output.codes["text"]  # (batch_size, num_quantizers)
    >>> model.decode(output.codes)["text"]  # (batch_size, embedding_dim)
    ```
    """

    def __init__(self, config: MMRQVAEConfig):
        super().__init__(config)
        branch_class = MMRQVAEAnchorBranch if config.objective == "stress" else MMRQVAEEncoderBranch
        self.branches = nn.ModuleDict(
            {name: branch_class(config, width) for name, width in zip(config.modalities, config.embedding_dims)}
        )
        self.post_init()

    def code_vectors(self, modality: str) -> torch.Tensor:
        """
        The code vectors of one modality.

        Args:
            modality (`str`): One of `config.modalities`.

        Returns:
            `torch.Tensor` of shape `(num_quantizers, codebook_size, codebook_dim)`.

        Raises:
            ValueError: If the model does not have the modality.
        """
        return torch.stack([layer.codebook for layer in self._branch(modality).quantizer.layers])

    def encode(
        self, embeddings: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> MMRQVAEEncoderOutput:
        """
        Semantic IDs of items.

        Args:
            embeddings (`dict[str, torch.Tensor]` of shape `(batch_size, embedding_dim)` a modality):
                Any of the model's modalities.
            present (`dict[str, torch.BoolTensor]` of shape `(batch_size,)` a modality, *optional*):
                Which items have the modality; all of them by default. Rows of items that lack it are not looked at:
                their codes and quantized vectors are those of the mean embedding.

        Returns:
            [`MMRQVAEEncoderOutput`].

        Raises:
            ValueError: If a modality is unknown, a shape does not fit, or an embedding is not finite.
        """
        codes, quantized = {}, {}
        for modality, values in self._checked(embeddings, present).items():
            branch = self.branches[modality]
            codes[modality] = branch.encode(values)
            quantized[modality] = branch.quantizer.decode(codes[modality])
        return MMRQVAEEncoderOutput(codes=codes, quantized=quantized)

    def decode(self, codes: dict[str, torch.LongTensor]) -> dict[str, torch.Tensor]:
        """
        Embeddings that semantic IDs stand for.

        Args:
            codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` a modality): Codes from 0 to
                `codebook_size - 1`.

        Returns:
            `dict[str, torch.Tensor]` of shape `(batch_size, embedding_dim)` a modality.

        Raises:
            ValueError: If a modality is unknown or its codes do not have one column a level.
        """
        reconstructions = {}
        for modality, values in codes.items():
            branch = self._branch(modality)
            if values.dim() != 2 or values.shape[1] != self.config.num_quantizers:
                raise ValueError(
                    f"codes['{modality}'] must have shape (batch_size, {self.config.num_quantizers}), "
                    f"got {tuple(values.shape)}."
                )
            reconstructions[modality] = branch.decode(branch.quantizer.decode(values))
        return reconstructions

    def forward(
        self,
        embeddings: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor] | None = None,
        codes: dict[str, torch.LongTensor] | None = None,
        return_loss: bool = True,
    ) -> MMRQVAEOutput:
        """
        Args:
            embeddings (`dict[str, torch.Tensor]` of shape `(batch_size, embedding_dim)` a modality): Embeddings of the
                same items.
            present (`dict[str, torch.BoolTensor]` of shape `(batch_size,)` a modality, *optional*):
                Which items have the modality; all by default. The others take part in no loss.
            codes (`dict[str, torch.LongTensor]` of shape `(batch_size, num_quantizers)` a modality, *optional*):
                Codes to train the code vectors with; by default those that the items get now, which the objective
                `"stress"` takes longer to find than to learn from.
            return_loss (`bool`, *optional*, defaults to `True`): Whether to compute the losses.

        Returns:
            [`MMRQVAEOutput`].

        Raises:
            ValueError: If a modality is unknown, a shape does not fit, or an embedding is not finite.
        """
        embeddings = self._checked(embeddings, present)
        output = MMRQVAEOutput(codes={}, quantized={}, reconstructions={})
        masks, losses = {}, []
        for modality, values in embeddings.items():
            branch = self.branches[modality]
            inputs = branch.standardize(values)
            given = codes[modality] if codes is not None else None
            mask = present[modality].bool() if present is not None else torch.ones_like(values[:, 0], dtype=torch.bool)
            masks[modality] = mask
            step = self._stress_step if self.config.objective == "stress" else self._encoder_step
            chosen, quantized, outputs, parts = step(branch, values, inputs, given, mask, return_loss)
            output.codes[modality] = chosen
            output.quantized[modality] = quantized
            output.reconstructions[modality] = outputs * branch.input_scale + branch.input_mean
            losses.append(parts)
        if return_loss:
            zero = self.branches[self.config.modalities[0]].input_scale.new_zeros(())
            for name in ("objective_loss", "decoding_loss", "codebook_loss", "commitment_loss"):
                output[name] = sum((parts[name] for parts in losses if name in parts), zero)
            output.alignment_loss = self._alignment_loss(output.quantized, masks, zero)
            output.loss = (
                self.config.objective_weight * output.objective_loss
                + output.decoding_loss
                + self.config.codebook_loss_weight * output.codebook_loss
                + self.config.commitment_loss_weight * output.commitment_loss
                + self.config.alignment_loss_weight * output.alignment_loss
            )
        return output

    def _stress_step(self, branch, values, inputs, codes, mask, return_loss):
        """Codes, quantized vectors, the decoder's outputs and the losses by name, of one modality without encoder."""
        if codes is None:
            codes = branch.encode(values)
        vectors = branch.quantizer.decode(codes)
        # The decoder only reads: what the quantized vectors are is for the distances to decide.
        outputs = branch.decoder(vectors.detach())
        losses = {}
        if return_loss:
            losses["objective_loss"] = stress_loss(inputs[mask], vectors[mask], branch.stress_offset, branch.focus)
            losses["decoding_loss"] = _mean_squared_error(outputs[mask], inputs[mask])
        return codes, vectors, outputs, losses

    def _encoder_step(self, branch, values, inputs, codes, mask, return_loss):
        """As [`_stress_step`], of one modality with an encoder, whose gradient passes straight through the codes."""
        latents = branch.latents(inputs)
        if codes is None:
            codes = branch.quantizer.encode(latents)
        vectors = branch.quantizer.decode(codes)
        losses = {}
        if self.config.objective == "distance":
            # The gradient reaches the code vectors, and past them the encoder; the decoder only reads.
            quantized = vectors + (latents - latents.detach())
            outputs = branch.decoder(vectors.detach())
            if return_loss:
                losses["objective_loss"] = distance_correlation_loss(
                    inputs[mask], quantized[mask], self.config.distance_focus
                )
                losses["decoding_loss"] = _mean_squared_error(outputs[mask], inputs[mask])
                # Distances leave the scale open: code vectors that outgrow the latents leave no residuals.
                losses["codebook_loss"] = _mean_squared_error(vectors[mask], latents[mask].detach())
                losses["commitment_loss"] = _mean_squared_error(latents[mask], vectors[mask].detach())
        else:
            quantized = latents + (vectors - latents).detach()
            outputs = branch.decoder(quantized)
            if return_loss:
                losses["objective_loss"] = self._reconstruction_loss(outputs[mask], inputs[mask])
                losses["codebook_loss"], losses["commitment_loss"] = self._level_losses(
                    branch.quantizer, latents[mask], codes[mask]
                )
        return codes, quantized, outputs, losses

    def _branch(self, modality: str) -> MMRQVAEBranch:
        if modality not in self.branches:
            raise ValueError(f"Unknown modality '{modality}'; this quantizer has {', '.join(self.config.modalities)}.")
        return self.branches[modality]

    def _checked(
        self, embeddings: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """The embeddings in the order of the config, with the rows of items that lack the modality at the mean."""
        checked = {}
        for modality in embeddings:
            self._branch(modality)
        rows = {modality: values.shape[0] for modality, values in embeddings.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"The embeddings of all modalities must have one row an item, got {rows} rows.")
        for modality, width in zip(self.config.modalities, self.config.embedding_dims):
            if modality not in embeddings:
                continue
            values, mean = embeddings[modality], self.branches[modality].input_mean
            if values.dim() != 2 or values.shape[1] != width:
                raise ValueError(
                    f"embeddings['{modality}'] must have shape (batch_size, {width}), got {tuple(values.shape)}."
                )
            if present is not None:
                if modality not in present or present[modality].shape != values.shape[:1]:
                    raise ValueError(
                        f"present['{modality}'] must be given with shape ({values.shape[0]},), one value an item."
                    )
                values = torch.where(present[modality].bool()[:, None], values, mean.to(values.dtype))
            finite = values.isfinite().all(-1)
            if not finite.all():
                raise ValueError(
                    f"embeddings['{modality}'] holds NaN or infinity, "
                    f"first in row {int(finite.long().argmin())} of the batch."
                )
            checked[modality] = values
        return checked

    def _reconstruction_loss(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        if self.config.objective == "paper":
            return mmd(outputs, inputs)
        if self.config.objective == "mse":
            return _mean_squared_error(outputs, inputs)
        return mmd(outputs, inputs) + _mean_squared_error(outputs, inputs)

    def _level_losses(
        self, quantizer: MMRQVAEResidualVectorQuantizer, latents: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over levels of the squared distances that pull code vectors to residuals, and residuals to code
        vectors."""
        residual, codebook, commitment = latents, [], []
        for level, layer in enumerate(quantizer.layers):
            vectors = layer.decode(codes[:, level])
            codebook.append(_mean_squared_error(vectors, residual.detach()))
            commitment.append(_mean_squared_error(residual, vectors.detach()))
            residual = residual - vectors.detach()
        return torch.stack(codebook).mean(), torch.stack(commitment).mean()

    def _alignment_loss(
        self, quantized: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], zero: torch.Tensor
    ) -> torch.Tensor:
        anchor, *others = self.config.modalities
        if self.config.alignment_loss_weight == 0 or anchor not in quantized:
            return zero
        losses = []
        for modality in others:
            if modality not in quantized:
                continue
            both = masks[anchor] & masks[modality]
            left, right = quantized[anchor][both], quantized[modality][both]
            if self.config.alignment == "mmd":
                losses.append(mmd(left, right))
            else:
                losses.append(info_nce(left, right, self.config.alignment_temperature))
        return sum(losses, zero)


def _mean_squared_error(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared distance of rows, mean over the rows and divided by the width; 0 if there is no row."""
    return (left.float() - right.float()).square().sum() / max(left.numel(), 1)


__all__ = [
    "MMRQVAEEncoderOutput",
    "MMRQVAEModel",
    "MMRQVAEOutput",
    "MMRQVAEPreTrainedModel",
]

"""What an item is to the recommender: embeddings and semantic IDs of its modalities, a free ID vector, and how the
score weighs them."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_mmesid import MMESIDConfig
from .modeling_mmrqvae import MMRQVAEModel


# Items of a large catalogue whose vectors are computed at a time: a few hundred MiB at most for wide embeddings.
ITEMS_PER_BLOCK = 2**15

# Known items whose codes tell whether a quantizer is the model's, and the share of their codes that must agree: for an
# unrelated quantizer it is one in `codebook_size`.
QUANTIZER_PROBES = 64
MINIMUM_AGREEMENT = 0.3

# The share of the seen items that stand for those which training never saw.
RAREST_SHARE = 0.05

# One tensor for each modality.
Tables = dict[str, torch.Tensor] | None


class MMESIDModality(nn.Module):
    """
    One modality of the items: the frozen embedding, projected, and the semantic ID, embedded by trainable code
    vectors. The embeddings are centred and scaled to a mean norm of one, which a projection would learn, but slowly.
    """

    def __init__(self, config: MMESIDConfig, embedding_dim: int):
        super().__init__()
        rows, hidden_size = config.num_items + 1, config.hidden_size
        self.num_quantizers, self.codebook_size = config.num_quantizers, config.codebook_size
        self.scores_embeddings = config.use_embeddings
        self.scores_codes = config.share_item_table and config.num_quantizers > 0
        self.register_buffer("embeddings", torch.zeros(rows, embedding_dim))
        self.register_buffer("present", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("center", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(()))
        if self.scores_embeddings:
            self.projection = nn.Linear(embedding_dim, hidden_size)
            self.absent_embedding = nn.Parameter(torch.zeros(hidden_size))
        if self.num_quantizers:
            self.register_buffer("codes", torch.zeros(rows, self.num_quantizers, dtype=torch.long))
            self.code_vectors = nn.Parameter(torch.zeros(self.num_quantizers, self.codebook_size, config.codebook_dim))
            self.code_projection = nn.Identity()
            if config.codebook_dim != hidden_size:
                self.code_projection = nn.Linear(config.codebook_dim, hidden_size, bias=False)
            self.absent_code = nn.Parameter(torch.zeros(hidden_size))

    def project(self, items: torch.Tensor) -> torch.Tensor:
        """p_m = W_m x_m + b_m of the given rows, `(items, hidden)`; a learnt vector where the modality is missing."""
        projected = self.projection((self.embeddings[items] - self.center) * self.scale)
        return torch.where(self.present[items, None], projected, self.absent_embedding)

    def embed_codes(self, items: torch.Tensor) -> torch.Tensor:
        """q_m, the sum of the rows' code vectors over levels, `(items, hidden)`; a learnt vector where missing."""
        return torch.where(self.present[items, None], self.code_projection(self._summed(items)), self.absent_code)

    def source(self, items: torch.Tensor) -> torch.Tensor:
        """What the modality puts into the fused table, `(items, hidden)`: in the shared form the codes, too."""
        if not self.scores_codes:
            return self.project(items)
        codes = self.embed_codes(items)
        return self.project(items) + codes if self.scores_embeddings else codes

    def _summed(self, items: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(self.num_quantizers, device=items.device) * self.codebook_size
        return nn.functional.embedding_bag(self.codes[items] + offsets, self.code_vectors.flatten(0, 1), mode="sum")

    @torch.no_grad()
    def initialize(self, embeddings: torch.Tensor, present: torch.Tensor, codes: torch.Tensor | None) -> None:
        """Takes the modality's tables of [`MMESIDItems.initialize`], already checked."""
        # No copy where none is needed: a table that is mapped from its file stays so, and processes share it. What is
        # cut out of a wider table could not be saved.
        self.embeddings = embeddings.to(self.embeddings).contiguous()
        self.present.copy_(present)
        # In blocks: no copy of a large table.
        known = present.nonzero()[:, 0].split(ITEMS_PER_BLOCK)
        center = sum(embeddings[block].sum(0, dtype=torch.float64) for block in known) / present.sum()
        self.center.copy_(center)
        lengths = sum((embeddings[block].double() - center).norm(dim=-1).sum() for block in known) / present.sum()
        self.scale.copy_(1 / lengths.clamp(min=1e-12))
        if codes is not None:
            self.codes.copy_(codes.clamp(min=0))

    @torch.no_grad()
    def initialize_codes(self, code_vectors: torch.Tensor, length: float) -> None:
        """
        Starts from trained code vectors, `(levels, codebook_size, codebook_dim)`, scaled to a mean `length` of what
        [`embed_codes`] gives: distances between items stay in proportion. Where widths differ, principal directions,
        turned at random, map them to the model's; a wider quantizer loses the directions of least variance.
        """
        self.code_vectors.copy_(code_vectors)
        items = self.present.nonzero()[:, 0]
        if isinstance(self.code_projection, nn.Linear):
            hidden_size, width = self.code_projection.weight.shape
            total = products = torch.zeros((), device=self.code_vectors.device)
            for block in items.split(ITEMS_PER_BLOCK):
                summed = self._summed(block).double()
                total, products = total + summed.sum(0), products + summed.T @ summed
            covariance = products - torch.outer(total, total) / len(items)
            kept = min(width, hidden_size)
            directions = torch.linalg.eigh(covariance).eigenvectors[:, width - kept :]
            turn = nn.init.orthogonal_(torch.empty(hidden_size, kept, dtype=directions.dtype))
            self.code_projection.weight.copy_(turn.to(directions.device) @ directions.T)
        # Items that are all alike have codes at zero, which no factor lengthens.
        self.code_vectors.mul_(length / self.embed_codes(items).norm(dim=-1).mean().clamp(min=1e-12))


class MMESIDFusion(nn.Module):
    r"""
    Weights of an item's sources by how often it was seen in training:
    \\(g_i = \mathrm{softmax}(\mathrm{MLP}(\mathrm{norm}(\log(1 + freq_i))) / temperature)\\).
    All start with equal weight. The range of the normalisation is kept: items added later must not shift the others.
    """

    def __init__(self, config: MMESIDConfig, num_sources: int):
        super().__init__()
        self.temperature = config.fusion_temperature
        self.by_frequency = config.fuse_by_frequency
        self.register_buffer("frequencies", torch.zeros(config.num_items + 1, dtype=torch.long))
        # Of integers, which no loading in half precision rounds.
        self.register_buffer("frequency_range", torch.tensor([0, 1]))
        self.hidden = nn.Linear(1, config.fusion_hidden_size)
        self.output = nn.Linear(config.fusion_hidden_size, num_sources)

    def forward(self, items: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Weights of the given rows, `(items, sources)`, that sum to one over what an item has in `present`, `(items,
        sources)` in bool."""
        low, high = torch.log1p(self.frequency_range.float())
        normalised = (torch.log1p(self.frequencies[items].float()) - low) / (high - low).clamp(min=1e-6)
        # Items that are added later count as the rarest.
        normalised = normalised.clamp(min=0)
        if not self.by_frequency:
            normalised = torch.zeros_like(normalised)
        hidden = nn.functional.gelu(self.hidden(normalised[:, None].to(self.hidden.weight.dtype)))
        logits = self.output(hidden) / self.temperature
        return torch.softmax(logits.masked_fill(~present, -torch.inf), dim=-1)


class MMESIDItems(nn.Module):
    """
    What an item is, to the backbone (its token) and to the score (its row of the fused table). Shared form: token and
    row are the same vector, the fusion of a free ID vector and, per modality, projection plus codes. Paper's form: the
    token is GELU(MLP([p_m, q_m, ...])), the table fuses a score head with the projections.
    """

    def __init__(self, config: MMESIDConfig):
        super().__init__()
        self.config = config
        rows, hidden_size = config.num_items + 1, config.hidden_size
        widths = zip(config.modalities, config.embedding_dims, strict=True)
        self.modalities = nn.ModuleDict({name: MMESIDModality(config, width) for name, width in widths})
        self.has_id_source = config.use_item_ids or not config.share_item_table
        self.id_embeddings = nn.Embedding(rows, hidden_size, padding_idx=0) if self.has_id_source else None
        self.register_buffer("removed", torch.zeros(rows, dtype=torch.bool))
        self.source_names = ["id"] * self.has_id_source + list(config.modalities)
        self.fusion = MMESIDFusion(config, self.has_id_source + len(self.modalities))
        self.token_id_embeddings = None
        if not config.share_item_table:
            self.token_id_embeddings = nn.Embedding(rows, hidden_size, padding_idx=0) if config.use_item_ids else None
            parts = len(self.modalities) * (2 if config.num_quantizers else 1) + config.use_item_ids
            self.token_mlp = nn.Linear(parts * hidden_size, hidden_size)

    @torch.no_grad()
    def initialize(
        self, frequencies: torch.Tensor, embeddings: Tables, present: Tables, codes: Tables, code_vectors: Tables
    ) -> None:
        """Fills the catalogue, see [`MMESIDForSequentialRecommendation.initialize_items`]."""
        config, rows = self.config, self.config.num_items + 1
        if frequencies.shape != (rows,) or frequencies.is_floating_point() or (frequencies < 0).any():
            raise ValueError(
                f"frequencies are {frequencies.dtype} of shape {tuple(frequencies.shape)}; give one count, 0 or more, "
                f"per row, 0..{config.num_items}."
            )
        embeddings, codes, code_vectors = embeddings or {}, codes or {}, code_vectors or {}
        names = sorted(config.modalities)
        coded = names if config.num_quantizers else []
        for kind, tables, expected in (
            ("embeddings", embeddings, names),
            ("codes", codes, coded),
            ("code_vectors", code_vectors, coded if code_vectors else []),
        ):
            if sorted(tables) != expected:
                raise ValueError(
                    f"{kind} are given for {sorted(tables)}, but the configuration has {expected}; give one table for "
                    "each."
                )
        present = self._masks(embeddings, present, rows)
        for name, mask in present.items():
            mask[0] = False
            if not mask.any():
                raise ValueError(f"No item has the modality '{name}'; leave it out of the configuration's modalities.")
        for name, vectors in code_vectors.items():
            _check_table("code_vectors", name, vectors, tuple(self.modalities[name].code_vectors.shape))
        for name, table in codes.items():
            _check_table("codes", name, table, (rows, config.num_quantizers), floating=False)
            wrong = ((table < 0) & present[name].to(table.device)[:, None]) | (table >= config.codebook_size)
            if wrong.any():
                row = int(wrong.any(-1).nonzero()[0])
                raise ValueError(
                    f"The codes of '{name}' in row {row} are {table[row].tolist()}, outside "
                    f"0..{config.codebook_size - 1}; take them from the quantizer that the configuration describes."
                )
        self.fusion.frequencies.copy_(frequencies)
        self.fusion.frequency_range.copy_(torch.stack(frequencies[1:].aminmax()))
        taken: set[int] = set()
        for name, modality in self.modalities.items():
            # One tensor under two names could not be saved.
            table = embeddings[name].clone() if embeddings[name].data_ptr() in taken else embeddings[name]
            taken.add(table.data_ptr())
            modality.initialize(table, present[name], codes.get(name))
            if code_vectors:
                # As long as an ID vector, on average: one source must not drown the others before training.
                modality.initialize_codes(code_vectors[name], config.initializer_range * config.hidden_size**0.5)

    @torch.no_grad()
    def extend(self, embeddings: Tables, present: Tables, quantizer: MMRQVAEModel | None) -> list[int]:
        """Adds items after training, see [`MMESIDForSequentialRecommendation.add_items`]."""
        config = self.config
        unknown = set(embeddings) - set(config.modalities)
        if unknown or not embeddings:
            raise ValueError(
                f"embeddings are given for {sorted(embeddings) or 'nothing'}, but items have "
                f"{config.modalities or 'nothing but trained ID vectors, so that none can be added'}."
            )
        # NumPy's arrays too, which encoders give in any precision.
        tables = {name: torch.as_tensor(table) for name, table in embeddings.items()}
        embeddings = {name: table.float() if table.is_floating_point() else table for name, table in tables.items()}
        present = {name: torch.as_tensor(mask) for name, mask in (present or {}).items()}
        count = len(next(iter(embeddings.values())))
        present = self._masks(embeddings, present, count)
        without = (~torch.stack(list(present.values())).any(0)).nonzero()[:, 0]
        if len(without):
            raise ValueError(
                f"New item {int(without[0])} has no modality at all, and without training nothing else can score it."
            )
        if config.num_quantizers:
            self.check_quantizer(quantizer, embeddings)
        for name, modality in self.modalities.items():
            table = embeddings.get(name, torch.zeros(count, modality.embeddings.shape[1]))
            has = present.get(name, torch.zeros(count, dtype=torch.bool))
            if config.num_quantizers:
                codes = modality.codes.new_zeros(count, config.num_quantizers)
                if has.any():
                    found = quantizer.encode({name: table[has].to(quantizer.device)}).codes[name]
                    codes[has.to(codes.device)] = found.to(codes)
                modality.codes = torch.cat([modality.codes, codes])
            modality.embeddings = torch.cat([modality.embeddings, table.to(modality.embeddings)])
            modality.present = torch.cat([modality.present, has.to(modality.present)])
        self.fusion.frequencies = nn.functional.pad(self.fusion.frequencies, (0, count))
        self.removed = nn.functional.pad(self.removed, (0, count))
        for name, table in list(self.named_children()):
            if isinstance(table, nn.Embedding):
                weight = nn.functional.pad(table.weight, (0, 0, 0, count))
                setattr(self, name, nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=0))
        first = config.num_items + 1
        config.num_items += count
        return list(range(first, first + count))

    def _masks(self, embeddings: Tables, present: Tables, rows: int) -> dict[str, torch.Tensor]:
        """Which rows of the given tables have each modality, `(rows,)`; those with a non-zero embedding by default."""
        masks: dict[str, torch.Tensor] = {}
        if unknown := sorted((present or {}).keys() - embeddings):
            raise ValueError(f"present is given for '{unknown[0]}', but embeddings only for {sorted(embeddings)}.")
        for name, table in embeddings.items():
            _check_table("embeddings", name, table, (rows, self.modalities[name].embeddings.shape[1]))
            mask = present[name].clone() if name in (present or {}) else (table != 0).any(-1)
            if mask.dtype != torch.bool or mask.shape != (rows,):
                raise ValueError(
                    f"present of '{name}' is {mask.dtype} of shape {tuple(mask.shape)}; give torch.bool of shape "
                    f"({rows},), one value per row of its embeddings."
                )
            masks[name] = mask
        return masks

    @torch.no_grad()
    def check_quantizer(self, quantizer: MMRQVAEModel | None, modalities: Iterable[str]) -> None:
        """
        Raises a `ValueError` unless the quantizer made the items' codes: those of another training mean other things.
        Known items tell: the right one gives most of their codes again (an ID that was moved to be unique differs, or
        one that rounded embeddings no longer decide).
        """
        shape = (self.config.num_quantizers, self.config.codebook_size)
        if quantizer is None or (quantizer.config.num_quantizers, quantizer.config.codebook_size) != shape:
            raise ValueError(f"The items have {shape[0]} codes of {shape[1]}; give the quantizer that made them.")
        for name in modalities:
            known = self.modalities[name]
            rows = known.present.nonzero()[:QUANTIZER_PROBES, 0]
            expected = known.codes[rows].cpu()
            found = quantizer.encode({name: known.embeddings[rows].to(quantizer.device)}).codes[name].cpu()
            agreement = (found == expected).double().mean()
            if agreement < MINIMUM_AGREEMENT:
                raise ValueError(
                    f"The quantizer gives the model's own items other codes of '{name}' than they have "
                    f"({agreement:.0%} agree); give the one that the model was trained with."
                )

    def rows(self) -> torch.Tensor:
        """All rows, 0 for padding and 1 to the number of items."""
        return torch.arange(len(self.removed), device=self.removed.device)

    def sources(self, items: torch.Tensor) -> torch.Tensor:
        """What the fused table is made of, `(items, sources, hidden)`: ID vector (or score head), then modalities."""
        sources = [self._learnt(self.id_embeddings, items)] if self.has_id_source else []
        return torch.stack(sources + [modality.source(items) for modality in self.modalities.values()], dim=1)

    def weights(self, items: torch.Tensor) -> torch.Tensor:
        """
        Fusion weights `(items, sources)`, the ID vector (or score head) first, scaled to sum to the number of sources:
        a factor that no ranking sees, without which every source would learn more slowly the more there are. A
        modality that an item lacks has weight 0.
        """
        present = [torch.ones_like(items, dtype=torch.bool)] if self.has_id_source else []
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
        sources = torch.stack([modality.source(items) for modality in self.modalities.values()], dim=1)
        return weights[:, :1], torch.einsum("is,ish->ih", weights[:, self.has_id_source :], sources)

    def vectors(self, items: torch.Tensor) -> torch.Tensor:
        """Rows of the fused table, `(items, hidden)`: the weighted sum of the sources."""
        id_weight, content = self._id_weight_and_content(items)
        if not self.has_id_source:
            return content
        return torch.addcmul(content, id_weight, self._learnt(self.id_embeddings, items))

    def _learnt(self, embeddings: nn.Embedding, items: torch.Tensor) -> torch.Tensor:
        """Vectors that are learnt for each item, `(items, hidden)`, after training with those of unseen items filled
        in."""
        return embeddings(items) if self.training else self.fill_unseen(embeddings(items), items, embeddings.weight)

    def fill_unseen(self, vectors: torch.Tensor, items: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """
        `vectors` of `items`, `(items, width)`, where those that training never saw, and those added after it, have the
        mean of the rarest items' vectors in `table`. Training only tells an unseen item that nobody chose it, and
        without a vector it would outrank all others, whose vectors lower their scores.
        """
        frequencies = self.fusion.frequencies
        unseen = (frequencies[items] == 0) & (items != 0)
        seen = frequencies[frequencies > 0]
        if not unseen.any() or not len(seen):
            return vectors
        limit = seen.kthvalue(math.ceil(RAREST_SHARE * len(seen))).values
        rarest = table[((frequencies > 0) & (frequencies <= limit)).nonzero()[:, 0]]
        return torch.where(unseen[:, None], rarest.mean(0), vectors)

    def table(self) -> torch.Tensor:
        """The whole fused table, `(items + 1, hidden)`. Of a large catalogue, what the modalities compute on the way,
        many times the table, is held for one block at a time, and computed again in the backward pass."""
        rows = self.rows()
        if len(rows) <= ITEMS_PER_BLOCK:
            id_weight, content = self._id_weight_and_content(rows)
        else:
            blocks = [
                checkpoint(self._id_weight_and_content, block, use_reentrant=False, preserve_rng_state=False)
                for block in rows.split(ITEMS_PER_BLOCK)
            ]
            id_weight, content = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        if not self.has_id_source:
            return content
        # Not looked up in training, which would copy a large table.
        ids = self.id_embeddings.weight if self.training else self._learnt(self.id_embeddings, rows)
        return torch.addcmul(content, id_weight, ids)

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
            parts.append(self._learnt(self.token_id_embeddings, items))
        return nn.functional.gelu(self.token_mlp(torch.cat(parts, dim=-1)))


def _check_table(kind: str, name: str, table: torch.Tensor, shape: tuple[int, ...], floating: bool = True) -> None:
    if table.dtype == torch.bool or table.is_floating_point() != floating or table.shape != shape:
        numbers = "floating-point numbers" if floating else "integers"
        raise ValueError(
            f"The {kind} of '{name}' are {table.dtype} of shape {tuple(table.shape)}, where {numbers} of shape "
            f"{shape} are expected; make the table from the same items, encoder and quantizer as the model's."
        )
    finite = torch.isfinite(table).flatten(1).all(-1)
    if not finite.all():
        raise ValueError(
            f"The {kind} of '{name}' hold NaN or infinity in row {int((~finite).nonzero()[0])}; make the table again."
        )

"""What scores items beside the decoder: similarity to the latest items of a history, and SASRec. Nothing here is
trained with the decoder: scores that were learnt apart err apart, and their sum ranks better than either."""

from collections.abc import Sequence

import torch
from torch import nn

from .configuration_mmesid import MMESIDConfig
from .items_mmesid import ITEMS_PER_BLOCK, MMESIDItems, MMESIDModality
from .modeling_sasrec import SASRecModel


# Directions of an embedding in which items differ less than this share of the most are noise, not whitened.
MINIMUM_SPREAD = 1e-4

# Behind the name of a modality, the name of its similarity among the sources of a score.
SIMILARITY = "_similarity"


class MMESIDSimilarity(nn.Module):
    """
    The vectors by which items of one modality are compared: embeddings whitened along their principal directions and
    scaled to length one, so that no direction, such as that of a common brand, outweighs the others.
    """

    def __init__(self, embedding_dim: int, similarity_dim: int):
        super().__init__()
        self.register_buffer("whitening", torch.zeros(embedding_dim, min(embedding_dim, similarity_dim)))

    @torch.no_grad()
    def initialize(self, modality: MMESIDModality) -> None:
        """Finds the principal directions of the items that have the modality."""
        products: torch.Tensor | float = 0.0
        for block in modality.present.nonzero()[:, 0].split(ITEMS_PER_BLOCK):
            known = modality.embeddings[block].double() - modality.center.double()
            products = products + known.T @ known
        variances, directions = torch.linalg.eigh(products / modality.present.sum())
        kept = self.whitening.shape[1]
        variances, directions = variances[-kept:].flip(0), directions[:, -kept:].flip(1)
        spread = variances.clamp(min=0).sqrt()
        inverse = torch.where(spread > MINIMUM_SPREAD * spread[0], 1 / spread, 0.0)
        self.whitening.copy_(directions * inverse)

    def vectors(self, modality: MMESIDModality) -> torch.Tensor:
        """Vectors of all rows, `(items + 1, similarity_dim)`; zero where the modality is missing."""
        # Centred afterwards: no copy of a large table.
        whitened = modality.embeddings @ self.whitening - modality.center @ self.whitening
        return nn.functional.normalize(whitened, dim=-1) * modality.present[:, None]


class MMESIDScorers(nn.Module):
    """
    Scores that are added to the decoder's, each the inner product of a user's state with a vector per item, times its
    weight in the configuration:

    - for each modality in `similarity_weights`, the similarity to the history, in which an item counts
      `similarity_decay` times as much as the one after it;
    - with `sasrec_config`, those of a SASRec that was trained on its own, whose user state is its own, too.
    """

    def __init__(self, config: MMESIDConfig):
        super().__init__()
        self.config = config
        widths = dict(zip(config.modalities, config.embedding_dims, strict=True))
        self.similarities = nn.ModuleDict(
            {name: MMESIDSimilarity(widths[name], config.similarity_dim) for name in config.similarity_weights}
        )
        self.sasrec = None
        if config.sasrec_config is not None:
            self.sasrec = SASRecModel(config.sasrec_config).requires_grad_(False)  # type: ignore[arg-type]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each score by the name of its source, such as `"text_similarity"` and `"sasrec"`. To change them
        is to change the configuration."""
        weights = {f"{name}{SIMILARITY}": weight for name, weight in self.config.similarity_weights.items()}
        return weights if self.sasrec is None else weights | {"sasrec": self.config.sasrec_weight}

    @weights.setter
    def weights(self, weights: dict[str, float]) -> None:
        for source, weight in weights.items():
            if source == "sasrec":
                self.config.sasrec_weight = weight
            else:
                self.config.similarity_weights[source.removesuffix(SIMILARITY)] = weight

    def widths(self) -> dict[str, int]:
        """Width of each source's vectors; sources of weight 0 are left out."""
        widths = {
            f"{name}{SIMILARITY}": similarity.whitening.shape[1] for name, similarity in self.similarities.items()
        }
        if self.sasrec is not None:
            widths["sasrec"] = self.sasrec.config.hidden_size
        return {source: width for source, width in widths.items() if self.weights[source]}

    def initialize(self, items: MMESIDItems) -> None:
        """Prepares the similarities of a new catalogue."""
        for name, similarity in self.similarities.items():
            similarity.initialize(items.modalities[name])

    def tables(self, items: MMESIDItems) -> list[torch.Tensor]:
        """What each source holds of the items, `(items + 1, width)`; of those that training never saw, or SASRec does
        not know, as [`MMESIDItems.fill_unseen`] says."""
        tables = []
        for source in self.widths():
            if source == "sasrec":
                known = self.sasrec.item_embeddings.weight
                rows = items.rows()
                tables.append(
                    items.fill_unseen(nn.functional.pad(known, (0, 0, 0, len(rows) - len(known))), rows, known)
                )
            else:
                name = source.removesuffix(SIMILARITY)
                tables.append(self.similarities[name].vectors(items.modalities[name]))
        return tables

    def states(self, histories: torch.Tensor, tables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The user states, `(batch, width)` for each of `tables`, times the weights; `histories` are rows of items,
        `(batch, length)`, oldest first, 0 where there is none."""
        states = []
        for source, table in zip(self.widths(), tables, strict=True):
            if source == "sasrec":
                state = self._sasrec_states(histories)
            else:
                vectors = nn.functional.embedding(histories, table)
                state = decayed_sum(vectors, histories, self.config.similarity_decay)
            states.append(self.weights[source] * state)
        return states

    def _sasrec_states(self, histories: torch.Tensor) -> torch.Tensor:
        config = self.sasrec.config
        known, lengths = latest(histories.where(histories <= config.num_items, 0), config.max_history)
        states = self.sasrec(known, (lengths - 1).clamp(min=0))
        # A history without any item that SASRec knows has no state.
        return states * (lengths > 0)[:, None]


def decayed_sum(vectors: torch.Tensor, histories: torch.Tensor, decay: float) -> torch.Tensor:
    """The sum over the items of a history, `(batch, width)`, of their `vectors`, `(batch, length, width)`, each times
    `decay` to the power of how many items come after it in `histories`, `(batch, length)`."""
    present = histories != 0
    later = present.sum(-1, keepdim=True) - present.cumsum(-1)
    weights = decay ** later.to(vectors.dtype) * present
    return (weights[..., None] * vectors).sum(1)


def latest(histories: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latest items of `histories`, `(batch, any)` with 0 where there is none, at most `length` of each, moved to
    the front of rows of shape `(batch, length)`, and how many these are, `(batch,)`."""
    present = histories != 0
    counts = present.sum(-1)
    # Stable: the items keep their order.
    order = present.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    front = nn.functional.pad(histories.gather(1, order), (0, length))
    start = (counts - length).clamp(min=0)
    index = start[:, None] + torch.arange(length, device=histories.device)
    return front.gather(1, index), counts.clamp(max=length)

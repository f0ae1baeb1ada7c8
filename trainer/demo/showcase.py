"""What the demo computes: items found by a word, a ranking with its sources, and neighbours by semantic ID."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor
from modeling_mmesid.recommendation import evaluating, mask_histories, pad_histories

from ..recommender.description import most_alike, similarity_vectors


# Items whose contributions are held at a time where a source is left out.
ITEMS_PER_BLOCK = 4096


class Recommended(NamedTuple):
    """An item with its score, and what each source that counts adds to it; they sum to the score."""

    row: int
    score: float
    contributions: dict[str, float]


class Showcase:
    """
    A recommender as the demo asks it. Items are rows; ids and titles are what the processor says.

    Args:
        model ([`MMESIDForSequentialRecommendation`]): The recommender, in evaluation mode.
        processor ([`MMESIDProcessor`]): Its processor.
        picture (`Callable[[int], Image.Image | None]`, *optional*): The picture of a row, if the item has one.

    Attributes:
        sources (`list[str]`): What scores are made of: `"id"` and the modalities.
    """

    def __init__(
        self,
        model: MMESIDForSequentialRecommendation,
        processor: MMESIDProcessor,
        picture: Callable[[int], Image.Image | None] = lambda row: None,
    ):
        self.model, self.processor, self.picture = model, processor, picture
        self.num_items = len(processor.item_ids)
        titles = processor.titles or processor.item_ids
        self.titles = ["", *(title or item_id for title, item_id in zip(titles, processor.item_ids))]
        self._searched = [f"{title} {item_id}".lower() for title, item_id in zip(titles, processor.item_ids)]
        self._removed = set(model.removed_items.nonzero()[:, 0].tolist())
        self.sources = list(self._score_parts(self._user([1]), torch.tensor([1])))
        items, self._vectors = model.model.items, similarity_vectors(model)
        self.frequencies = items.fusion.frequencies.cpu()
        self.codes: dict[str, torch.Tensor] = {}
        if model.config.num_quantizers:
            for name, modality in items.modalities.items():
                # What an item lacks is like nothing.
                self.codes[name] = torch.where(modality.present[:, None], modality.codes, -1).cpu()

    def item_id(self, row: int) -> str:
        return self.processor.item_ids[row - 1]

    def popular(self, count: int) -> list[int]:
        """The rows seen most often in training."""
        return self._most_frequent(torch.arange(1, self.num_items + 1), count)

    def search(self, words: str, count: int) -> list[int]:
        """Rows whose title or id holds all of the words, frequent ones first, the popular ones without a word; a
        `ValueError` says that there are none."""
        wanted = words.lower().split()
        if not wanted:
            return self.popular(count)
        found = [row for row, text in enumerate(self._searched, 1) if all(word in text for word in wanted)]
        if not found:
            raise ValueError(f"No item has '{words.strip()[:80]}' in its title or id; try fewer or shorter words.")
        return self._most_frequent(torch.tensor(found), count)

    def rows_of(self, item_ids: str) -> list[int]:
        """Rows of raw ids between commas or white space; a `ValueError` names the first that is unknown."""
        ids = re.findall(r"[^\s,]+", item_ids)
        if not ids:
            raise ValueError("There is no item id; write some with spaces or commas between them.")
        return self.processor.convert_item_ids_to_rows(ids)

    def require_item(self, row) -> int:
        """The row, if it is an item's; a page can be made to send anything."""
        if not isinstance(row, int) or isinstance(row, bool) or not 1 <= row <= self.num_items:
            raise ValueError(f"There is no item in row {str(row)[:20]}; choose one of the page.")
        return row

    @torch.no_grad()
    def recommend(self, history: Sequence[int], sources: Sequence[str], count: int) -> list[Recommended]:
        """
        The best items after a history, by what the `sources` add to their scores.

        Raises:
            ValueError: If there is no history or no source, or a source is none of the model's.
        """
        if not history:
            raise ValueError("The history is empty; choose an item to begin with.")
        if unknown := sorted(set(sources) - set(self.sources)):
            raise ValueError(f"There is no source '{unknown[0]}'; there are {', '.join(self.sources)}.")
        if not sources:
            raise ValueError(f"No source is left to score with; switch on one of {', '.join(self.sources)}.")
        count = min(count, self.num_items - len({*history, *self._removed}))
        if count < 1:
            raise ValueError("No item is left to recommend; take one out of the history.")
        user, scores = self._user(history), torch.full((1, self.num_items + 1), -torch.inf)
        for block in torch.arange(1, self.num_items + 1).split(ITEMS_PER_BLOCK):
            parts = self._score_parts(user, block)
            scores[0, block] = torch.stack([parts[source] for source in sources]).sum(0)
        scores[:, list(self._removed)] = -torch.inf
        best = mask_histories(scores, pad_histories([history])).topk(count)
        parts = self._score_parts(user, best.indices[0])
        return [
            Recommended(row, score, {source: float(parts[source][place]) for source in sources})
            for place, (row, score) in enumerate(zip(best.indices[0].tolist(), best.values[0].tolist()))
        ]

    def shared_codes(self, row: int, modality: str) -> torch.Tensor:
        """How many leading codes of a modality each row shares with this one, `(items + 1,)`; 0 where either lacks
        it, and for the row itself."""
        codes = self.codes[modality]
        shared = ((codes == codes[row]) & (codes >= 0)).long().cumprod(1).sum(1)
        shared[row] = 0
        return shared

    def kin(self, row: int, modality: str, count: int) -> list[tuple[int, int]]:
        """The rows that share the most leading codes with this one, frequent ones first among equals, each with the
        number of codes."""
        shared = self.shared_codes(row, modality)
        rows = shared.nonzero()[:, 0]
        order = sorted(rows.tolist(), key=lambda one: (-int(shared[one]), -int(self.frequencies[one]), one))
        return [(one, int(shared[one])) for one in order[:count]]

    def nearest_of_history(self, row: int, history: Sequence[int]) -> tuple[str, int, int] | None:
        """Modality, shared leading codes and row of the item of the history that shares the most with this one."""
        found = [
            (int(self.shared_codes(row, modality)[one]), modality, one)
            for modality in self.codes
            for one in dict.fromkeys(history)
        ]
        shared, modality, one = max(found, key=lambda entry: entry[0], default=(0, "", 0))
        return (modality, shared, one) if shared else None

    def most_alike(self, row: int, history: Sequence[int]) -> tuple[str, int] | None:
        """Modality and row of the item of the history that is most like this one."""
        return most_alike(row, history, self._vectors)

    def _user(self, history: Sequence[int]) -> torch.Tensor:
        with evaluating(self.model), torch.no_grad():
            return self.model.encode_histories([list(history)])

    def _score_parts(self, user: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each source adds to the scores of rows, `(rows,)` each, on the CPU."""
        with evaluating(self.model), torch.no_grad():
            parts = self.model.score_contributions(user, rows[None].to(user.device))
        return {name: part[0].float().cpu() for name, part in parts.items()}

    def _most_frequent(self, rows: torch.Tensor, count: int) -> list[int]:
        rows = rows[[row not in self._removed for row in rows.tolist()]]
        order = self.frequencies[rows].argsort(descending=True, stable=True)
        return rows[order[:count]].tolist()

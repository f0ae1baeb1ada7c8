"""Scoring, ranking and recommending: one place for training, evaluation, `recommend` and the pipeline."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import nn
from transformers.utils import ModelOutput

from .loss_catalogue import aligned_rows


# Scores whose maximum is taken before the best are looked for: 64 float32 values are four cache lines.
ITEMS_PER_MAXIMUM = 64


@dataclass
class SequentialRecommendationOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given): Cross-entropy over the
            whole catalogue.
        user_embeddings (`torch.FloatTensor` of shape `(targets, hidden)`): One vector per labelled position, in the
            order of the flattened `labels`; without labels one per sequence, at its end, as wide as the item table.
    """

    loss: torch.Tensor | None = None
    user_embeddings: torch.Tensor | None = None


@dataclass
class RecommendationOutput(ModelOutput):
    """
    Args:
        items (`torch.LongTensor` of shape `(batch, top_k)`): Rows of the recommended items, best first.
        scores (`torch.FloatTensor` of shape `(batch, top_k)`): Their scores.
        contributions (`dict[str, torch.FloatTensor]`, each of shape `(batch, top_k)`, *optional*, returned when
            `return_contributions=True`): What each source adds to an item's score: `"id"` for the free ID vector, each
            modality by its name, and what scores beside the decoder, such as `"text_similarity"` and `"sasrec"`; they
            sum to the scores.
    """

    items: torch.Tensor | None = None  # type: ignore[assignment]
    scores: torch.Tensor | None = None
    contributions: dict[str, torch.Tensor] | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode; afterwards, also after an exception, it is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def score_items(user_embeddings: torch.Tensor, item_table: torch.Tensor) -> torch.Tensor:
    """Inner products `(batch, items + 1)`, in float32 and without gradients, of users `(batch, hidden)` with the item
    table `(items + 1, hidden)`; padding scores minus infinity."""
    user_embeddings = user_embeddings.to(item_table.dtype)
    scores = aligned_rows(len(user_embeddings), len(item_table), item_table.device)
    with torch.no_grad():
        if item_table.dtype == torch.float32:
            torch.mm(user_embeddings, item_table.T, out=scores)
        else:
            scores.copy_(user_embeddings @ item_table.T)
    scores[:, 0] = -torch.inf
    return scores


def mask_histories(scores: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
    """Sets scores, `(batch, items + 1)`, of the items of histories, `(batch, length)` with 0 for padding, to -inf."""
    return scores.scatter_(1, histories, -torch.inf)


def top_items(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `top_k` largest of `scores`, `(batch, items + 1)`, and their rows, both `(batch, top_k)`, best first, as
    `torch.topk` gives them. A row of scores is cut into blocks: the best items are in the blocks with the largest
    maxima, and a maximum costs a CPU a fraction of what keeping a list of the best does.
    """
    rows, columns = scores.shape[1], scores.shape[1] // ITEMS_PER_MAXIMUM
    if scores.device.type != "cpu" or columns < 2 * top_k:
        best = scores.topk(top_k)
        return best.values, best.indices
    whole = columns * ITEMS_PER_MAXIMUM
    maxima = scores[:, :whole].unflatten(1, (columns, ITEMS_PER_MAXIMUM)).amax(-1)
    blocks = maxima.topk(top_k).indices * ITEMS_PER_MAXIMUM  # (batch, top_k)
    inside = (blocks[..., None] + torch.arange(ITEMS_PER_MAXIMUM)).flatten(1)
    # What is left behind the last whole block is looked at in any case.
    candidates = torch.cat([inside, torch.arange(whole, rows).expand(len(scores), -1)], dim=1)
    best = scores.gather(1, candidates).topk(top_k)
    return best.values, candidates.gather(1, best.indices)


def target_ranks(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Rank `(batch,)` of each target `(batch,)` among all items, from 1, given scores `(batch, items + 1)`. Ties and
    NaN count against the target: a model that scores all items alike ranks it last."""
    # `not <` rather than `>=`: NaN counts against the target.
    return (~(scores < scores.gather(1, targets[:, None]))).sum(-1)


def require_rows(name: str, rows: Sequence[int], num_items: int) -> None:
    """Raises a `ValueError` if a row is outside 1..`num_items`, or no integer: nothing is rounded."""
    for row in rows.tolist() if isinstance(rows, np.ndarray | torch.Tensor) else rows:
        if not isinstance(row, Integral) or isinstance(row, bool | np.bool_) or not 1 <= row <= num_items:
            raise ValueError(
                f"{name} holds row {row}, outside 1..{num_items}; use the processor to turn item ids into rows."
            )


def check_histories(histories: Sequence[Sequence[int]], num_items: int) -> None:
    """Raises a `ValueError` if there is no history, one is empty, or one holds a row not in 1..`num_items`."""
    if len(histories) == 0:
        raise ValueError("There is no history to recommend for; give a list of rows for one user at least.")
    for index, history in enumerate(histories):
        if isinstance(history, Integral):
            raise ValueError(f"History {index} is the row {history}; give a list of rows for each user.")
        if len(history) == 0:
            raise ValueError(f"History {index} is empty; give at least one item, or leave the user out.")
        require_rows(f"History {index}", history, num_items)


def excluded_items(
    num_items: int, allowed: Sequence[int] | None, denied: Sequence[int] | None, removed: torch.Tensor | None
) -> torch.Tensor:
    """Which rows may not be recommended to anybody, `(items + 1,)` in bool, from lists of rows and from those that are
    `removed`, `(items + 1,)` in bool."""
    excluded = torch.full((num_items + 1,), allowed is not None)
    for name, rows, state in (("allowed_items", allowed, False), ("denied_items", denied, True)):
        rows = rows.tolist() if isinstance(rows, torch.Tensor) else list(rows or [])
        require_rows(name, rows, num_items)
        excluded[rows] = state
    if removed is not None:
        excluded |= removed.cpu()
    excluded[0] = True
    return excluded


def pad_histories(histories: Sequence[Sequence[int]], device: torch.device | None = None) -> torch.Tensor:
    """Histories as a `torch.LongTensor` of shape `(batch, longest)`, padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(history, dtype=torch.long) for history in histories], batch_first=True
    ).to(device)


class RecommendationMixin:
    """`recommend` for models with `encode_histories(histories) -> (batch, hidden)`, `item_table() -> (items + 1,
    hidden)` and `score_contributions(user_embeddings, items) -> dict[str, (batch, top_k)]`."""

    # Rows that are read in histories but never recommended, `(items + 1,)` in bool.
    removed_items: torch.Tensor | None = None

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        top_k: int = 10,
        exclude_history: bool = True,
        batch_size: int = 256,
        return_contributions: bool = False,
        allowed_items: Sequence[int] | None = None,
        denied_items: Sequence[int] | None = None,
    ) -> RecommendationOutput:
        """
        Ranks the whole catalogue for every user.

        Args:
            histories (`list[list[int]]`): Item rows of each user, oldest first; [`MMESIDProcessor`] gives them.
            top_k (`int`, *optional*, defaults to `10`): Items to return for each user.
            exclude_history (`bool`, *optional*, defaults to `True`): Never return an item of the user's own history.
            batch_size (`int`, *optional*, defaults to `256`): Users at a time.
            return_contributions (`bool`, *optional*, defaults to `False`): Whether to split every score into what its
                sources add to it.
            allowed_items (`list[int]`, *optional*): Rows to choose from, for all users; all items by default.
            denied_items (`list[int]`, *optional*): Rows that no user may get.

        Returns:
            [`RecommendationOutput`] with `items` and `scores` of shape `(batch, top_k)`.

        Raises:
            ValueError: If there is no history or one is empty, a history or list names a row outside the catalogue,
            or fewer than `top_k` items are left to recommend.
        """
        num_items = self.config.num_items
        check_histories(histories, num_items)
        excluded = excluded_items(num_items, allowed_items, denied_items, self.removed_items)
        excluded_rows = excluded.nonzero()[:, 0].to(self.device)
        candidates = num_items + 1 - len(excluded_rows)
        for index, history in enumerate(histories):
            if 1 <= top_k <= candidates - exclude_history * len(history):
                continue
            left = candidates - (int((~excluded[list(set(history))]).sum()) if exclude_history else 0)
            if not 1 <= top_k <= left:
                remedy = f"ask for 1 to {left}" if left else "allow more items, or exclude_history=False"
                raise ValueError(
                    f"top_k is {top_k}, but {left} items can be recommended to history {index}; {remedy}."
                )
        items, scores, contributions = [], [], []
        # Like with like, so that a short history is not padded to the length of a long one.
        order = sorted(range(len(histories)), key=lambda index: len(histories[index]))
        with evaluating(self):
            item_table = self.item_table()
            for start in range(0, len(histories), batch_size):
                batch = [histories[index] for index in order[start : start + batch_size]]
                user_embeddings = self.encode_histories(batch)
                batch_scores = score_items(user_embeddings, item_table)  # (batch, items + 1)
                batch_scores.index_fill_(1, excluded_rows, -torch.inf)
                if exclude_history:
                    mask_histories(batch_scores, pad_histories(batch, batch_scores.device))
                best_scores, best = top_items(batch_scores, top_k)
                items.append(best)
                scores.append(best_scores)
                if return_contributions:
                    contributions.append(self.score_contributions(user_embeddings, best))
        given = torch.tensor(order).argsort()

        def in_given_order(batches: list[torch.Tensor]) -> torch.Tensor:
            together = torch.cat(batches)
            return together[given.to(together.device)]

        parts = None
        if return_contributions:
            parts = {name: in_given_order([part[name] for part in contributions]) for name in contributions[0]}
        return RecommendationOutput(items=in_given_order(items), scores=in_given_order(scores), contributions=parts)

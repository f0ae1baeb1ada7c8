"""Batches of users for the recommenders."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_mmesid.packing import pack_histories
from modeling_mmesid.recommendation import pad_histories


# Fewer lengths mean fewer shapes to compile for.
PAD_TO_MULTIPLE_OF = 8


@dataclass
class HistoryCollator:
    """
    Batches for models that read items and text, with the prompt tokens `suffix_ids` after the items; the prompt before
    them, which all users share, is left to the model.

    Training examples (`history`, `targets`) become model inputs with labels; if `packed`, the prefixes of a user share
    a sequence. For the loss `num_candidates` items are drawn for the whole batch (0 takes the whole catalogue), each
    row as likely as `sampling_weights` `(items + 1,)` say. Evaluation examples (`history`, `target`) become the inputs
    that read the latest `max_history` items, with `seen` (`(batch, longest)`, the whole history, to be masked) and
    `target` (`(batch,)`).
    """

    max_history: int
    suffix_ids: Sequence[int] = ()
    packed: bool = True
    num_candidates: int = 0
    sampling_weights: torch.Tensor | None = None

    def __post_init__(self):
        if self.num_candidates:
            probabilities = self.sampling_weights.double() / self.sampling_weights.double().sum()
            self.log_counts = torch.log(self.num_candidates * probabilities)
            self.cumulative = probabilities.cumsum(0)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        training = "targets" in examples[0]
        histories = [example["history"] for example in examples]
        targets = [example["targets"] for example in examples] if training else None
        latest = histories if training else [history[-self.max_history :] for history in histories]
        batch = pack_histories(latest, self.suffix_ids, targets, PAD_TO_MULTIPLE_OF, self.packed)
        if training and self.num_candidates:
            draws = torch.rand(self.num_candidates, dtype=torch.double)
            drawn = torch.searchsorted(self.cumulative, draws, right=True).clamp_(max=len(self.cumulative) - 1)
            batch |= {"candidates": drawn, "candidate_log_counts": self.log_counts[drawn].float()}
        if not training:
            batch["seen"] = pad_histories(histories)
            batch["target"] = torch.tensor([int(example["target"]) for example in examples])
        return batch


@dataclass
class ItemCollator(HistoryCollator):
    """The same for models that read items alone (SASRec)."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        # Positions are learnt up to `max_history`: padding must not reach beyond.
        inputs = {name: batch[name][:, : self.max_history] for name in ("items", "labels") if name in batch}
        return inputs | {name: batch[name] for name in ("seen", "target") if name in batch}

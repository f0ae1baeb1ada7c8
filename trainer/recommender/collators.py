"""Batches of users for the recommenders."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_mmesid.packing import pack_histories
from modeling_mmesid.recommendation import pad_histories


@dataclass
class HistoryCollator:
    """
    Batches for models that read items and text.

    Training examples (`history`, `targets`) become model inputs with labels. Evaluation examples (`history`, `target`)
    become the inputs that read the latest `max_history` items, with `seen` (`(batch, longest)`, the whole history, to
    be masked) and `target` (`(batch,)`). The prompt before the items, which all users share, is left to the model.

    Args:
        max_history (`int`): Longest history that the model reads.
        suffix_ids (`Sequence[int]`, *optional*, defaults to `()`): Prompt tokens after the items.
        pad_to_multiple_of (`int`, *optional*, defaults to `8`): Padded length is a multiple of this.
        packed (`bool`, *optional*, defaults to `True`): Whether the training prefixes of a user share a sequence.
        num_candidates (`int`, *optional*, defaults to `0`): Items to sample for the loss, one draw for the whole
            batch; 0 takes the whole catalogue.
        sampling_weights (`torch.Tensor` of shape `(items + 1,)`, *optional*): How likely each row is to be drawn, up
            to a factor; needed if items are sampled.
    """

    max_history: int
    suffix_ids: Sequence[int] = ()
    pad_to_multiple_of: int = 8
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
        batch = pack_histories(
            [example["history"] if training else example["history"][-self.max_history :] for example in examples],
            self.suffix_ids,
            [example["targets"] for example in examples] if training else None,
            self.pad_to_multiple_of,
            self.packed,
        )
        if training and self.num_candidates:
            draws = torch.rand(self.num_candidates, dtype=torch.double)
            batch["candidates"] = torch.searchsorted(self.cumulative, draws, right=True).clamp_(
                max=len(self.cumulative) - 1
            )
            batch["candidate_log_counts"] = self.log_counts[batch["candidates"]].float()
        if training:
            return batch
        batch["seen"] = pad_histories([example["history"] for example in examples])
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

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

    Training examples (`history`, `targets`) become packed model inputs with labels. Evaluation examples (`history`,
    `target`) become the inputs that read the latest `max_history` items, with `seen` (`(batch, longest)`, the whole
    history, to be masked) and `target` (`(batch,)`).

    Args:
        max_history (`int`): Longest history that the model reads.
        prefix_ids (`Sequence[int]`, *optional*, defaults to `()`): Prompt tokens before the items.
        suffix_ids (`Sequence[int]`, *optional*, defaults to `()`): Prompt tokens after the items.
    """

    max_history: int
    prefix_ids: Sequence[int] = ()
    suffix_ids: Sequence[int] = ()

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        if "targets" in examples[0]:
            return pack_histories(
                [example["history"] for example in examples],
                self.prefix_ids,
                self.suffix_ids,
                [example["targets"] for example in examples],
            )
        batch = pack_histories(
            [example["history"][-self.max_history :] for example in examples], self.prefix_ids, self.suffix_ids
        )
        batch["seen"] = pad_histories([example["history"] for example in examples])
        batch["target"] = torch.tensor([int(example["target"]) for example in examples])
        return batch


@dataclass
class ItemCollator(HistoryCollator):
    """The same for models that read items alone (SASRec)."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        wanted = ("items", "labels") if "targets" in examples[0] else ("items", "seen", "target")
        return {name: batch[name] for name in wanted}

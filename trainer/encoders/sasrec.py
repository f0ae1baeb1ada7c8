"""The item embeddings of a SASRec, which is the collaborative modality."""

import torch

from modeling_mmesid import SASRecForSequentialRecommendation

from .encoding import PretrainedEncoder


class SASRecEncoder(PretrainedEncoder):
    """Knows the items of the dataset that it was trained on, and reads nothing of them."""

    model_help = "the directory that `mmesid sasrec` wrote"
    reads = ()
    pooling = "item embeddings"

    def __init__(self, model: SASRecForSequentialRecommendation):
        self.model = model

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None) -> "SASRecEncoder":
        return cls(
            SASRecForSequentialRecommendation.from_pretrained(name_or_path, revision=revision, dtype=torch.float32)
        )

    @torch.inference_mode()
    def item_embeddings(self, num_items: int) -> torch.Tensor:
        """The embeddings of items 1 to N, `(num_items, hidden_size)` in float32, on the CPU."""
        embeddings = self.model.item_table()[1:]
        if len(embeddings) != num_items:
            raise ValueError(
                f"The SASRec knows {len(embeddings)} items where the prepared dataset has {num_items}; train it on "
                "this prepared dataset with `mmesid sasrec`."
            )
        return embeddings.float().cpu().clone()

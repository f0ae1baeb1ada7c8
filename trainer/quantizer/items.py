"""Tables of embeddings as a dataset of items."""

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm


ENCODING_BATCH = 8_192
# Held-out items are at most so many: what the model makes of them is held until the end of the evaluation.
HELD_OUT_ITEMS = 10_000


class ItemTables(Dataset):
    """
    Rows of embedding tables, read a batch at a time.

    Args:
        embeddings (`dict[str, torch.Tensor]` of shape `(items + 1, embedding_dim)` a modality): Tables indexed by row.
        present (`dict[str, torch.BoolTensor]` of shape `(items + 1,)` a modality): Which items have the modality.
        rows (`torch.LongTensor` of shape `(selected,)`, *optional*):
            The rows that make up the dataset. Defaults to every item that has some modality; never the padding row 0.
        weights (`torch.Tensor` of shape `(items + 1,)`, *optional*): How often an item is drawn, to learn from and as
            an anchor, in proportion, for the objective `"stress"`. Defaults to all alike.

    Attributes:
        codes (`dict[str, torch.LongTensor]` of shape `(items + 1, num_quantizers)` a modality, *optional*): Codes that
            batches bring along, for the training of code vectors; [`MMRQVAETrainer`] sets them.

    Raises:
        ValueError: If the tables do not have the same number of rows.
    """

    def __init__(
        self,
        embeddings: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor],
        rows: torch.LongTensor | None = None,
        weights: torch.Tensor | None = None,
    ):
        if weights is None:
            weights = torch.ones(len(next(iter(embeddings.values()))))
        sizes = {modality: len(table) for modality, table in embeddings.items()}
        sizes |= {f"present of {modality}": len(mask) for modality, mask in present.items()}
        sizes["weights"] = len(weights)
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"All tables must have one row an item and the padding row 0, got {sizes} rows; "
                "embed the same prepared dataset."
            )
        self.embeddings = embeddings
        self.present = present
        self.weights = weights
        if rows is None:
            rows = torch.stack(list(present.values())).any(0).nonzero()[:, 0]
        self.rows = rows[rows > 0]
        self.codes: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, dict[str, torch.Tensor]]:
        """A batch: what [`MMRQVAEModel.forward`] takes."""
        rows = self.rows[torch.as_tensor(indices)]
        batch = {
            "embeddings": {modality: table[rows] for modality, table in self.embeddings.items()},
            "present": {modality: mask[rows] for modality, mask in self.present.items()},
        }
        if self.codes is not None:
            batch["codes"] = {modality: codes[rows] for modality, codes in self.codes.items()}
        return batch

    def rows_with(self, modality: str) -> torch.LongTensor:
        """The dataset's rows that have the modality."""
        return self.rows[self.present[modality][self.rows]]

    def fewest(self) -> int:
        """How many items have the rarest modality."""
        return min(len(self.rows_with(modality)) for modality in self.embeddings)

    def split(self, fraction: float, generator: torch.Generator) -> tuple["ItemTables", "ItemTables"]:
        """Two datasets: all rows but a random `fraction`, and that fraction (three items at least, 10,000 at most)."""
        order = torch.randperm(len(self), generator=generator)
        held_out = max(min(round(fraction * len(self)), HELD_OUT_ITEMS), 3)
        return (
            ItemTables(self.embeddings, self.present, self.rows[order[held_out:]].sort().values, self.weights),
            ItemTables(self.embeddings, self.present, self.rows[order[:held_out]].sort().values, self.weights),
        )


def read_batches(branch, dataset: ItemTables, modality: str, rows: torch.LongTensor, what: str = "pass over"):
    """The embeddings of `rows`, a batch at a time, where the model is; a bar says `what` is done, if it takes long."""
    for part in tqdm(rows.split(ENCODING_BATCH), desc=f"{what} {modality}", unit="batch", delay=2, leave=False):
        yield dataset.embeddings[modality][part].to(branch.input_mean.device, torch.float32)

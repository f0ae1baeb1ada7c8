"""Tables of embeddings as a dataset of items."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.tables import EmbeddingTable


# Items whose embeddings are read at a time.
READ_ITEMS = 8_192
# Held-out items are three at least and so many at most: what the model makes of them is held until the end of the
# evaluation.
FEWEST_HELD_OUT = 3
MOST_HELD_OUT = 10_000


class ItemTables(Dataset):
    """The `rows` `(selected,)` of embedding tables, by default those of all items that have some modality; never the
    padding row 0. They are read batch by batch."""

    def __init__(self, tables: dict[str, EmbeddingTable], rows: torch.Tensor | None = None):
        sizes = {modality: len(table.embeddings) for modality, table in tables.items()}
        sizes |= {f"present of {modality}": len(table.present) for modality, table in tables.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"All tables must have one row per item and the padding row 0, got {sizes} rows; "
                "embed the same prepared dataset."
            )
        # As a mask: integers would be row numbers.
        self.tables = {name: EmbeddingTable(table.embeddings, table.present.bool()) for name, table in tables.items()}
        if rows is None:
            rows = torch.stack([table.present for table in self.tables.values()]).any(0).nonzero()[:, 0]
        self.rows = rows[rows > 0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, dict[str, torch.Tensor]]:
        """A batch: what [`MMRQVAEModel.forward`] takes."""
        rows = self.rows[torch.as_tensor(indices)]
        return {
            "embeddings": {modality: table.embeddings[rows] for modality, table in self.tables.items()},
            "present": {modality: table.present[rows] for modality, table in self.tables.items()},
        }

    def rows_with(self, *modalities: str) -> torch.Tensor:
        """The dataset's rows that have all of the modalities."""
        rows = self.rows
        for modality in modalities:
            rows = rows[self.tables[modality].present[rows]]
        return rows

    def read(
        self, modality: str, rows: torch.Tensor, device: torch.device, task: str = "pass over"
    ) -> Iterator[torch.Tensor]:
        """The embeddings of `rows` in float32 on the device, batch by batch; a bar names the `task` if it lasts."""
        embeddings = self.tables[modality].embeddings
        for part in tqdm(rows.split(READ_ITEMS), desc=f"{task} {modality}", unit="batch", delay=2, leave=False):
            yield embeddings[part].to(device, torch.float32)

    def split(self, fraction: float, generator: torch.Generator) -> tuple["ItemTables", "ItemTables"]:
        """Two datasets: all rows but a random `fraction`, and that fraction (three items at least, 10,000 at most)."""
        order = torch.randperm(len(self), generator=generator)
        held_out = max(min(round(fraction * len(self)), MOST_HELD_OUT), FEWEST_HELD_OUT)
        return (
            ItemTables(self.tables, self.rows[order[held_out:]].sort().values),
            ItemTables(self.tables, self.rows[order[:held_out]].sort().values),
        )

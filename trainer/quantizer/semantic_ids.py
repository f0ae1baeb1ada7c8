"""The file of all semantic IDs, and some of them with titles for readers."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch


SEMANTIC_IDS_NAME = "semantic_ids.parquet"
EXAMPLE_PAIRS = 4


def write_semantic_ids(path: str | os.PathLike, item_ids: list[str], codes: dict[str, torch.Tensor]) -> None:
    """Writes a Parquet file with one row per item: `item_id`, and a list of codes for each modality, null where the
    item lacks it, which `codes` `(items + 1, levels)` say with -1. Row 0 is padding."""
    columns = {"item_id": pa.array(item_ids[1:], pa.string())}
    for modality, values in codes.items():
        rows = [row if row[0] >= 0 else None for row in values[1:].tolist()]
        columns[modality] = pa.array(rows, pa.list_(pa.from_numpy_dtype(values.numpy().dtype)))
    pq.write_table(pa.table(columns), path)


def read_semantic_ids(
    path: str | os.PathLike, item_ids: list[str], modalities: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Reads what [`write_semantic_ids`] wrote of these items, in this order: for each of the modalities codes by row,
    `(items + 1, levels)`, -1 where missing."""
    path = Path(path)
    remedy = "write it again with `mmesid quantize` on this prepared dataset"
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; {remedy}.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); {remedy}.") from error
    missing = [name for name in ("item_id", *modalities) if name not in table.column_names]
    if missing:
        raise ValueError(f"'{path}' has no column '{missing[0]}', only {', '.join(table.column_names)}; {remedy}.")
    if table["item_id"].to_pylist() != item_ids[1:]:
        raise ValueError(f"'{path}' holds the semantic IDs of other items, or in another order; {remedy}.")
    codes = {}
    for name in modalities:
        rows = [None, *table[name].to_pylist()]
        empty = [-1] * max(len(row or ()) for row in rows)
        codes[name] = torch.tensor([row or empty for row in rows], dtype=torch.long)
    return codes


def semantic_id_examples(
    codes: dict[str, torch.Tensor], frequencies: torch.Tensor, item_ids: list[str], titles: list[str]
) -> list[dict]:
    """Pairs of items whose codes `(items + 1, levels)` begin alike, which shows what the codes mean: a frequent item,
    then the most frequent of the items that share most leading codes with it in the last modality. Each is given as
    `item_id`, `title` and `codes`, the latter by modality, a list or `None`."""
    modality = list(codes)[-1]
    # Stable, so that ties fall in the order of the rows.
    order = torch.argsort(frequencies, descending=True, stable=True)
    order = order[(order > 0) & (codes[modality][order, 0] >= 0)]
    ids = codes[modality][order]
    left = torch.ones(len(order), dtype=torch.bool)
    examples: list[dict] = []
    while len(examples) < 2 * EXAMPLE_PAIRS and left.sum() >= 2:
        most_frequent = int(left.long().argmax())
        left[most_frequent] = False
        shared = (ids == ids[most_frequent]).long().cumprod(1).sum(1)
        # `argmax` takes the first of equals, which is the most frequent.
        kin = int(shared.masked_fill(~left, -1).argmax())
        left[kin] = False
        for row in (int(order[most_frequent]), int(order[kin])):
            named = {name: values[row].tolist() if values[row, 0] >= 0 else None for name, values in codes.items()}
            examples.append({"item_id": item_ids[row], "title": titles[row], "codes": named})
    return examples

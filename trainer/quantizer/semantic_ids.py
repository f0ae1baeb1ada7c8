"""Semantic IDs for readers: the file of all of them, and some of them with titles."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import torch


SEMANTIC_IDS_NAME = "semantic_ids.parquet"
EXAMPLE_PAIRS = 4


def write_semantic_ids(path: str | os.PathLike, item_ids: list[str], codes: dict[str, torch.Tensor]) -> None:
    """
    Writes a Parquet file of one row an item: `item_id`, and a list of codes a modality, null where the item lacks it.

    Args:
        path (`str` or `os.PathLike`): The file.
        item_ids (`list[str]`): Raw ids by row; row 0 is padding.
        codes (`dict[str, torch.Tensor]` of shape `(items + 1, levels)` a modality): Codes by row, -1 where missing.
    """
    columns = {"item_id": pa.array(item_ids[1:], pa.string())}
    for modality, values in codes.items():
        levels = values.shape[1]
        missing = pa.array((values[1:, 0] < 0).numpy())
        flat = pa.array(values[1:].flatten().numpy())
        columns[modality] = pa.ListArray.from_arrays(
            pa.array(range(0, levels * len(values), levels), pa.int32()), flat, mask=missing
        )
    pq.write_table(pa.table(columns), path)


def semantic_id_examples(
    codes: dict[str, torch.Tensor], frequencies: torch.Tensor, item_ids: list[str], titles: list[str]
) -> list[dict]:
    """
    The most frequent items, each followed by the most frequent of those that share the most leading codes with it in
    the last modality: whether the two are alike shows what the codes mean.

    Args:
        codes (`dict[str, torch.Tensor]` of shape `(items + 1, levels)` a modality): Codes by row, -1 where missing.
        frequencies (`torch.LongTensor` of shape `(items + 1,)`): Occurrences in training.
        item_ids (`list[str]`): Raw ids by row; row 0 is padding.
        titles (`list[str]`): Titles by row.

    Returns:
        `list[dict]`: Dictionaries of `item_id`, `title` and `codes`, the latter a list or `None` a modality.
    """
    modality = list(codes)[-1]
    # Stable, so that ties fall in the order of the rows.
    order = torch.argsort(frequencies, descending=True, stable=True)
    order = order[(order > 0) & (codes[modality][order, 0] >= 0)]
    ids = codes[modality][order]
    left = torch.ones(len(order), dtype=torch.bool)
    examples = []
    while len(examples) < 2 * EXAMPLE_PAIRS and left.sum() >= 2:
        most_frequent = int(left.long().argmax())
        left[most_frequent] = False
        shared = (ids == ids[most_frequent]).long().cumprod(1).sum(1)
        # Of equal ones the first, which is the most frequent.
        kin = int(shared.masked_fill(~left, -1).argmax())
        left[kin] = False
        for row in (int(order[most_frequent]), int(order[kin])):
            named = {name: values[row].tolist() if values[row, 0] >= 0 else None for name, values in codes.items()}
            examples.append({"item_id": item_ids[row], "title": titles[row], "codes": named})
    return examples

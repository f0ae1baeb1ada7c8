"""Embedding tables: one safetensors file per modality, one row per item, and a mask of the items that have it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..running.records import StageRecord
from .columns import read_ids
from .files import listed, one_line, require_regular, shown
from .table_files import parquet_batches, readable


logger = logging.get_logger(__name__)

PRESENT_KEY = "present"
ITEM_ID = "item_id"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npz")
ROWS_PER_BLOCK = 2**14


class EmbeddingTable(NamedTuple):
    """
    The embeddings of one modality.

    Args:
        embeddings (`torch.FloatTensor` of shape `(items + 1, width)`): Row r belongs to item r; the padding row 0 and
            the rows of items that lack the modality are zero.
        present (`torch.BoolTensor` of shape `(items + 1,)`): Which items have the modality; never row 0.
    """

    embeddings: torch.Tensor
    present: torch.Tensor


def table_path(embeddings_dir: str | os.PathLike, modality: str) -> Path:
    """Where `mmesid embed` puts the table of a modality."""
    return Path(embeddings_dir) / f"{modality}.safetensors"


def table_encoders(embeddings_dir: str | os.PathLike, modalities: list[str]) -> dict[str, dict]:
    """What made the embeddings of each modality, where `mmesid embed` left a record of it, for new items need the
    same: `kind` (`None` for an imported table), `name` and `revision` of the encoder, the `column` that it read, and
    whether the vectors are `normalised`."""
    records = {modality: Path(embeddings_dir) / f"{modality}.json" for modality in modalities}
    details = {modality: StageRecord.load(path).details for modality, path in records.items() if path.is_file()}
    names = {"kind": "kind", "name": "encoder", "revision": "revision", "column": "column", "normalised": "normalised"}
    return {modality: {name: one.get(key) for name, key in names.items()} for modality, one in details.items()}


def load_table(path: str | os.PathLike, modality: str, num_items: int) -> EmbeddingTable:
    """The table that [`save_table`] wrote, in float32; raises `ValueError` if it does not belong to a catalogue of
    `num_items`, see [`check_table`]."""
    tensors = _read(Path(path))
    for key in (modality, PRESENT_KEY):
        if key not in tensors:
            raise ValueError(
                f"'{path}' has no key '{key}' but only {_names(tensors)}; write it with `mmesid embed --modality "
                f"{modality}`, or import it there with --from_file."
            )
    return check_table(EmbeddingTable(tensors[modality], tensors[PRESENT_KEY]), modality, num_items, f"'{path}'")


def import_table(
    path: str | os.PathLike, modality: str, num_items: int, item_ids: Sequence[str] | None = None
) -> EmbeddingTable:
    """
    A table that came from elsewhere, in any floating-point type.

    Args:
        path (`str` or `os.PathLike`): A Parquet file with the raw ids of items in `item_id` and their vectors in a
            column of lists, in any order; or, without ids and in the order of the rows, a safetensors file of shape
            `(num_items + 1, width)`, whose row 0 is padding and set to zero, or an .npy file of that shape or of
            `(num_items, width)`.
        modality (`str`): Key of the safetensors table, or column of the vectors; any where there is one alone.
        num_items (`int`): Items of the catalogue.
        item_ids (`Sequence[str]`, *optional*): Their `num_items + 1` raw ids, of which the first is that of no item;
            a Parquet table is joined by these.

    Returns:
        [`EmbeddingTable`]: Without a mask `present` in the file, items of all-zero rows, and items that are not in
        the file, lack the modality.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another kind, its rows are not those of the catalogue, or its ids repeat or
            name no item.
    """
    path = Path(path)
    require_regular(path)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"'{path}' may hold a pickle, which can run code and is not read; convert it with safetensors.torch."
            f"save_file({{'{modality}': torch.load('{path.name}', weights_only=True)}}, '{path.stem}.safetensors')."
        )
    if suffix == ".parquet":
        return _joined(path, modality, item_ids or [str(row) for row in range(num_items + 1)])
    tensors = {modality: _read_numpy(path, num_items)} if suffix == ".npy" else _read(path)
    present = tensors.pop(PRESENT_KEY, None)
    if modality not in tensors and len(tensors) != 1:
        raise ValueError(
            f"'{path}' has no key '{modality}' but {_names(tensors)}; rename the table's key, or leave the others out."
        )
    embeddings = tensors[modality] if modality in tensors else next(iter(tensors.values()))
    embeddings = _check_embeddings(embeddings, modality, num_items, f"'{path}'")
    if present is None:
        present = _rows(embeddings, lambda block: (block != 0).any(dim=1))
    _check_mask(present, num_items, f"'{path}'")
    present[0] = False
    embeddings[~present] = 0
    return EmbeddingTable(embeddings, present)


def _read_numpy(path: Path, num_items: int) -> torch.Tensor:
    """The array of a file, with the row of the padding."""
    try:
        # Mapped: what the header states is checked against the size of the file before memory is taken.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # Whatever the header makes NumPy stumble over.
    except Exception as error:
        raise ValueError(f"'{path}' is no array of numbers ({one_line(error)}); write it again.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or array.itemsize > 8:
        raise ValueError(
            f"'{path}' is not an array of floating-point numbers, of shape (items, width); write it again."
        )
    embeddings = torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).copy())
    if len(embeddings) != num_items:
        return embeddings
    return torch.cat([embeddings.new_zeros(1, embeddings.shape[1]), embeddings])


def _joined(path: Path, modality: str, item_ids: Sequence[str]) -> EmbeddingTable:
    """The vectors of a Parquet file in the order of the items, which are found by their ids."""
    rows = {item_id: row for row, item_id in enumerate(item_ids) if row}
    present = torch.zeros(len(item_ids), dtype=torch.bool)
    embeddings, unknown, example = None, 0, ""
    column = _vector_column(path, modality)
    for batch in parquet_batches(path, ROWS_PER_BLOCK, [ITEM_ID, column]):
        ids, bad = read_ids(batch[ITEM_ID], ITEM_ID, f"'{path}',")
        if bad:
            raise ValueError(
                f"'{path}' has {ITEM_ID}={shown(batch[ITEM_ID][next(iter(bad))].as_py())}; {bad.popitem()[1]}."
            )
        places = torch.tensor([rows.get(item_id, 0) for item_id in ids.to_pylist()])
        known = (places > 0) & torch.from_numpy(batch[column].is_valid().to_numpy(zero_copy_only=False))
        unknown += int((places == 0).sum())
        example = example or next((item_id for item_id in ids.to_pylist() if item_id not in rows), "")
        counts = torch.bincount(places[known], minlength=len(item_ids)) + present
        if (counts > 1).any():
            raise ValueError(
                f"'{path}' repeats item {shown(item_ids[_first(counts > 1)])}; keep one row of each item."
            )
        vectors = _vectors(batch[column].filter(pa.array(known.numpy())), path, column)
        if embeddings is None:
            embeddings = torch.zeros(len(item_ids), vectors.shape[1])
        if len(vectors) and vectors.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"'{path}' has vectors of {embeddings.shape[1]} and of {vectors.shape[1]} numbers in '{column}'; give "
                "all items as many."
            )
        if len(vectors):
            embeddings[places[known]] = vectors
            present[places[known]] = True
    if embeddings is None or not present.any():
        there = f" and there like {shown(example)}" if example else ""
        raise ValueError(
            f"'{path}' has a vector for no item of the catalogue, where ids look like {shown(item_ids[-1])}{there}; "
            "name the ids as the catalogue does."
        )
    if unknown:
        logger.warning(f"{unknown} rows of '{path}' are of no item of the catalogue, for example {shown(example)}.")
    return check_table(EmbeddingTable(embeddings, present), modality, len(item_ids) - 1, f"'{path}'")


def _vector_column(path: Path, modality: str) -> str:
    with readable(path):
        schema = pq.read_schema(path)
    lists = [one.name for one in schema if _is_list(one.type)]
    if ITEM_ID not in schema.names or (modality not in lists and len(lists) != 1):
        raise ValueError(
            f"'{path}' has the columns {listed(schema.names)}, where '{ITEM_ID}' and one of lists of numbers, or "
            f"'{modality}', are expected; rename them."
        )
    return modality if modality in lists else lists[0]


def _is_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _vectors(column: pa.Array, path: Path, name: str) -> torch.Tensor:
    """Lists `(rows,)` as `(rows, width)` in float32."""
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"'{path}' has vectors of {listed(map(str, sorted(lengths)))} numbers in '{name}'; give all as many."
        )
    numbers = pc.fill_null(column.flatten().cast(pa.float32()), float("nan")).to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.copy()).view(len(column), lengths[0] if lengths else 0)


def save_table(path: str | os.PathLike, modality: str, embeddings: torch.Tensor, present: torch.Tensor) -> None:
    """Writes a table `(items + 1, width)` in float32, with the rows that are not `present` set to zero, in one move: a
    reader sees the old file or the new one."""
    path, num_items = Path(path), len(embeddings) - 1
    present = present.detach().cpu()
    _check_mask(present, num_items, f"'{path}'")
    embeddings = torch.where(present.unsqueeze(1), embeddings.detach().cpu().float(), 0.0)
    table = check_table(EmbeddingTable(embeddings, present), modality, num_items, f"'{path}'")
    temporary = path.with_name(f".{path.name}.partial")
    save_file({modality: table.embeddings.contiguous(), PRESENT_KEY: present.contiguous()}, temporary)
    os.replace(temporary, path)


def check_table(table: EmbeddingTable, modality: str, num_items: int, where: str = "The table") -> EmbeddingTable:
    """The table in float32; raises `ValueError` if types or shapes are not those of `num_items` items, row 0 is
    present, a row that is not present is not zero, or a row holds NaN or infinity."""
    embeddings = _check_embeddings(table.embeddings, modality, num_items, where)
    _check_mask(table.present, num_items, where)
    if table.present[0]:
        raise ValueError(f"{where}: 'present' is true for row 0, which is padding and no item; set it to false.")
    filled = _rows(embeddings, lambda block: (block != 0).any(dim=1)) & ~table.present
    if filled.any():
        raise ValueError(
            f"{where}: row {_first(filled)} of '{modality}' is not zero though 'present' is false for it; set one "
            "right by the other."
        )
    return EmbeddingTable(embeddings, table.present)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; run `mmesid embed`, or correct the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise ValueError(f"'{path}' is not a safetensors file ({one_line(error)}); write it again.") from error


def _check_embeddings(embeddings: torch.Tensor, modality: str, num_items: int, where: str) -> torch.Tensor:
    if embeddings.dim() != 2 or embeddings.shape[1] == 0 or not embeddings.dtype.is_floating_point:
        raise ValueError(
            f"{where}: '{modality}' is {embeddings.dtype} of shape {tuple(embeddings.shape)} where floating-point "
            "numbers of shape (items + 1, width) are expected; give one row of numbers per item."
        )
    if len(embeddings) != num_items + 1:
        raise ValueError(
            f"{where}: '{modality}' has {len(embeddings)} rows where the catalogue of {num_items} items needs "
            f"{num_items + 1} (row 0 is padding, row i is item i); make the table from this prepared dataset."
        )
    embeddings = embeddings.float()
    bad = _rows(embeddings, lambda block: ~block.isfinite().all(dim=1))
    if bad.any():
        raise ValueError(
            f"{where}: row {_first(bad)} of '{modality}' holds NaN or infinity ({int(bad.sum())} such rows in all); "
            "compute these embeddings again."
        )
    return embeddings


def _check_mask(present: torch.Tensor, num_items: int, where: str) -> None:
    if present.dtype != torch.bool or present.shape != (num_items + 1,):
        raise ValueError(
            f"{where}: 'present' is {present.dtype} of shape {tuple(present.shape)} where torch.bool of shape "
            f"({num_items + 1},) is expected; give one truth value per row."
        )


def _rows(table: torch.Tensor, check: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What holds for each row, `(rows,)` bool: a mask of a whole large table would be as large again."""
    return torch.cat([check(block) for block in table.split(ROWS_PER_BLOCK)])


def _first(mask: torch.Tensor) -> int:
    return int(mask.int().argmax())


def _names(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(tensors)) or "no table at all"

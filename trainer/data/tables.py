"""Embedding tables: one safetensors file per modality, one row per item, and a mask of the items that have it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..running.records import StageRecord


PRESENT_KEY = "present"
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


def table_encoders(embeddings_dir: str | os.PathLike, modalities: list[str]) -> dict[str, str]:
    """What made the embeddings of each modality, where `mmesid embed` left a record of it: new items need the same."""
    records = {modality: Path(embeddings_dir) / f"{modality}.json" for modality in modalities}
    details = {modality: StageRecord.load(path).details for modality, path in records.items() if path.is_file()}
    return {
        modality: f"{one['encoder']} at {one['revision']}" if one["revision"] else one["encoder"]
        for modality, one in details.items()
    }


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


def import_table(path: str | os.PathLike, modality: str, num_items: int) -> EmbeddingTable:
    """
    A table that came from elsewhere: `(num_items + 1, width)` in any floating-point type, under the modality's name or
    under the file's only key besides `present`. Where the file has no `present` mask, an all-zero row counts as an
    item without the modality. The padding row 0 is set to zero.
    """
    tensors = _read(Path(path))
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
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a safetensors file ({error}); write it again.") from error


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

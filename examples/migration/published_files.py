# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "pandas", "pyarrow", "safetensors", "torch"]
# ///
"""
Turns the files that were published with MME-SID into those that `mmesid` reads.

    python examples/migration/published_files.py --output_dir data/beauty --sequences Beauty_new.txt \
        --items Beauty_text_img.csv --tables collaborative=SASRec_item_embed_new.pkl
    mmesid prepare --source sequences --source_dir data/beauty --output_dir runs/beauty/prepared
    mmesid embed --prepared_dir runs/beauty/prepared --output_dir runs/beauty/embeddings \
        --modality collaborative --from_file data/beauty/collaborative.safetensors

No pickle is run: of a pickled tensor its instructions are read as data and its numbers taken out, and anything but one
tensor is refused.
"""

import argparse
import io
import json
import pickletools
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file


# What a pickled tensor calls, and what it does here instead.
_STORAGE = "torch.storage._load_from_bytes"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_HOOKS = "collections.OrderedDict"
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
)  # fmt: skip


class _Mark:
    """Where a tuple begins on the stack."""


def read_pickled_tensor(path: str | Path) -> torch.Tensor:
    """
    The tensor that `pickle.dump` wrote, without unpickling.

    Raises:
        ValueError: If the file is no pickle, or holds or calls anything but one tensor.
    """
    refused = f"'{path}' is no pickle of one tensor"
    try:
        value = _interpret(Path(path).read_bytes())
        name, (storage, offset, size, stride, *_) = value
        loader, (payload,) = storage
        if (name, loader) != (_TENSOR, _STORAGE):
            raise ValueError(f"it calls {name}")
    except (TypeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{refused} ({error}); have its owner save it as safetensors.") from error
    # The numbers, in the format of torch.save: `weights_only` reads tensors and nothing else.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        numbers = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        flat = torch.empty(0, dtype=numbers.dtype).set_(numbers.untyped())
    return flat.as_strided(size, stride, offset).contiguous()


def _interpret(pickled: bytes):
    """The object of a pickle, where a call is a pair of the function's name and its arguments, and is not made."""
    stack: list = []
    memo: list = []
    for operation, argument, _ in pickletools.genops(pickled):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                stack.append(_Mark)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                start = len(stack) - 1 - stack[::-1].index(_Mark)
                stack[start:] = [tuple(stack[start + 1 :])]
            case "NEWFALSE" | "NEWTRUE" | "NONE":
                stack.append({"NEWFALSE": False, "NEWTRUE": True, "NONE": None}[operation.name])
            case "STACK_GLOBAL":
                stack[-2:] = [".".join(stack[-2:])]
            case "REDUCE":
                name, arguments = stack[-2:]
                if name not in (_STORAGE, _TENSOR, _HOOKS):
                    raise ValueError(f"it calls {name}")
                stack[-2:] = [(name, arguments)]
            case "STOP":
                return stack.pop()
            case name if name in _LITERALS:
                stack.append(argument)
            case name:
                raise ValueError(f"it holds {name}")
    raise ValueError("it has no end")


def read_table(path: str | Path) -> torch.Tensor:
    """Embeddings `(items + 1, width)` in float32, from a pickle (`.pkl`) or from what `torch.save` wrote (`.pt`)."""
    path = Path(path)
    if path.suffix == ".pkl":
        table = read_pickled_tensor(path)
    else:
        table = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(table, torch.Tensor) or table.squeeze().dim() != 2:
        raise ValueError(f"'{path}' holds no table with one row per item; correct the path.")
    return table.squeeze().detach().float()


def read_codes(path: str | Path, num_items: int) -> np.ndarray:
    """
    Codes `(items, levels)` of items 1 to N, from an index in JSON (`{"1": ["<a_5>", "<b_17>"]}`, or with numbers, keys
    from 0 or from 1) or from the array that `torch.save` wrote, whose row 0 is padding.

    Raises:
        ValueError: If an item has no codes, or another number of them than the others.
    """
    path = Path(path)
    if path.suffix == ".json":
        index = {int(item): codes for item, codes in json.loads(path.read_text(encoding="utf-8")).items()}
        # N entries from 0 leave no room for padding: then the first item is 0.
        first = 0 if 0 in index and len(index) == num_items else 1
        missing = [item for item in range(first, first + num_items) if item not in index]
        if missing:
            raise ValueError(
                f"'{path}' has no codes of item {missing[0]}, one of {num_items}; take the index of these."
            )
        rows = [[_number(code) for code in index[item]] for item in range(first, first + num_items)]
    else:
        numpy_arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.int64))]
        with torch.serialization.safe_globals(numpy_arrays):
            rows = np.asarray(torch.load(path, map_location="cpu", weights_only=True))[1:].tolist()
    if len(rows) != num_items or len({len(row) for row in rows}) != 1:
        raise ValueError(f"'{path}' does not give each of {num_items} items as many codes as the others.")
    return np.array(rows, dtype=np.int64)


def _number(code: int | str) -> int:
    """The code in `5`, `"5"` or `"<a_5>"`."""
    return int(re.findall(r"\d+", str(code))[-1])


def write_sequences(sequences: str | Path, items: str | Path | None, output_dir: Path) -> int:
    """Writes `sequences.txt` and `items.jsonl`, and returns how many items there are: the largest number that a user
    has chosen, or the last in the table of items."""
    lines = Path(sequences).read_text(encoding="utf-8").splitlines()
    num_items = max(int(item) for line in lines for item in line.split()[1:])
    described: dict[int, dict] = {}
    if items is not None:
        table = pd.read_csv(items, usecols=["id", "title", "imUrl"])
        for item, title, image in zip(table["id"].tolist(), table["title"].tolist(), table["imUrl"].tolist()):
            described[item] = {
                "title": title if isinstance(title, str) else None,
                "image": image if isinstance(image, str) else None,
            }
        num_items = max(num_items, *described)
    with open(output_dir / "items.jsonl", "w", encoding="utf-8") as file:
        for item in range(1, num_items + 1):
            line = {"item": item, "title": None} | described.get(item, {})
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shutil.copyfile(sequences, output_dir / "sequences.txt")
    return num_items


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Turn the files published with MME-SID into those of mmesid.")
    parser.add_argument("--sequences", required=True, help="Beauty_new.txt: one user per line, then items")
    parser.add_argument("--items", help="Beauty_text_img.csv: id, title and address of the picture of every item")
    parser.add_argument("--tables", nargs="*", default=[], metavar="MODALITY=FILE", help="embeddings, .pkl or .pt")
    parser.add_argument("--codes", nargs="*", default=[], metavar="MODALITY=FILE", help="semantic IDs, .json or .pt")
    parser.add_argument("--output_dir", required=True, type=Path)
    arguments = parser.parse_args(argv)
    try:
        convert(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"published_files: error: {error}\n")


def convert(arguments: argparse.Namespace) -> None:
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    num_items = write_sequences(arguments.sequences, arguments.items, arguments.output_dir)
    print(f"{num_items} items")
    for modality, file in _by_modality(arguments.tables):
        table = read_table(file)
        if len(table) != num_items + 1:
            raise ValueError(f"'{file}' has {len(table)} rows, not {num_items + 1}; it belongs to other items.")
        # Padding, which the published training had trained on as if it were an item.
        table[0] = 0
        save_file({modality: table}, arguments.output_dir / f"{modality}.safetensors")
        print(f"{modality}: {table.shape[1]} numbers per item")
    codes = {modality: read_codes(file, num_items) for modality, file in _by_modality(arguments.codes)}
    if codes:
        columns = {name: pa.array(list(values)) for name, values in codes.items()}
        item_ids = pa.array([str(item) for item in range(1, num_items + 1)])
        pq.write_table(pa.table({"item_id": item_ids} | columns), arguments.output_dir / "semantic_ids.parquet")
        for name, values in codes.items():
            shared = num_items - len(np.unique(values, axis=0))
            print(f"{name}: {values.shape[1]} codes per item, {shared} items share the ID of another one")


def _by_modality(entries: list[str]) -> list[tuple[str, str]]:
    pairs = [entry.partition("=") for entry in entries]
    for modality, _, file in pairs:
        if not file:
            raise ValueError(f"'{modality}' names no file; write modality=file, text=text.pt for example.")
    return [(modality, file) for modality, _, file in pairs]


if __name__ == "__main__":
    main()

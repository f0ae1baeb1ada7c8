"""Sound files of every kind that the data come in, small enough to be read a thousand times, and their readers."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from mmesid.trainer.data.histories import known_histories, read_histories
from mmesid.trainer.data.images import decode_image, list_images
from mmesid.trainer.data.preparation import prepare_source
from mmesid.trainer.data.prepared import SEQUENCE_FILES, PreparedDataset
from mmesid.trainer.data.sources import reader_of
from mmesid.trainer.data.table_files import TableLocation
from mmesid.trainer.data.tables import import_table, load_table
from tests.trainer.data.test_prepared import make_source

from .malformed import zipped


REVIEWS = [
    (user, item, 1_500_000_000 + 7 * n, n % 5 + 1) for n, (user, item) in enumerate(zip("abcab" * 4, "xyzzy" * 4))
]


def json_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def text_table(separator: str, *rows) -> bytes:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()


def parquet(columns: dict) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def columns(*names: str) -> dict:
    return dict(zip(names, map(list, zip(*REVIEWS)), strict=True))


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def picture(format: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


def array(dtype) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(8, dtype=dtype).reshape(4, 2) + 1)
    return file.getvalue()


ITEMS = [{"item_id": item, "title": f"Item {item}", "price": 2.5, "image": f"{item}.png"} for item in "xyz"]
META = {
    "title": "T", "description": ["d"], "features": ["f"], "categories": ["a", "b"], "price": 9.5, "store": "s",
    "details": {"Brand": "b"}, "images": [{"variant": "MAIN", "large": "http://a/b.jpg"}],
}  # fmt: skip
TABLE = text_table(",", ("user_id", "item_id", "timestamp", "rating"), *REVIEWS)
PRODUCTS = text_table(",", ("item_id", "title", "price"), *((item, f"Item {item}", 2.5) for item in "xyz"))
PICTURES = {name: picture(name) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}
ARCHIVED = {"x.png": PICTURES["PNG"], "deep/y.jpg": PICTURES["JPEG"], "notes.txt": b"no picture"}

# What each reader reads: the files by name, sound as they are here.
FILES: dict[str, dict[str, bytes]] = {
    "sequences": {"sequences.txt": b"a x y z x\nb y z x\nc z z y\n", "items.jsonl": json_lines(
        {"item": row["item_id"], **row} for row in ITEMS)},
    "csv": {"o.csv": TABLE, "i.csv": PRODUCTS},
    "csv, zipped": {"o.csv.zip": zipped({"o.csv": TABLE}), "i.csv.gz": gzip.compress(PRODUCTS)},
    "text without header": {"o.txt": text_table("\t", *REVIEWS)},
    "atomic": {
        "o.inter": text_table("\t", ("user_id:token", "item_id:token", "timestamp:float", "rating:float"), *REVIEWS),
        "i.item": b"item_id:token\ttitle:token_seq\nx\tOne\ny\tTwo\n",
    },
    "lines": {"o.jsonl": json_lines(dict(zip(("user_id", "item_id", "timestamp", "rating"), row)) for row in REVIEWS),
              "i.jsonl": json_lines(ITEMS)},
    "lines, gzipped": {"o.jsonl.gz": gzip.compress(json_lines(
        dict(zip(("user_id", "item_id", "timestamp"), row)) for row in REVIEWS))},
    "parquet": {"o.parquet": parquet(columns("user_id", "item_id", "timestamp", "rating"))},
    "parquet, items": {
        "o.csv": TABLE,
        "i.parquet": parquet(
            {
                "item_id": list("xyz"),
                "title": ["X", None, "Z"],
                "price": [1.5, None, 2.0],
                "image": [PICTURES["PNG"], None, PICTURES["JPEG"]],
            }
        ),
    },
    "amazon_2014": {
        "r.json": json_lines(dict(zip(("reviewerID", "asin", "unixReviewTime", "overall"), row)) for row in REVIEWS),
        "m.json": "".join(f"{META | {'asin': item, 'categories': [['a', 'b']]}!r}\n" for item in "xyz").encode(),
    },
    "amazon_2018": {
        "r.json.gz": gzip.compress(json_lines(
            dict(zip(("reviewerID", "asin", "unixReviewTime", "overall"), row)) for row in REVIEWS)),
        "m.json": json_lines(META | {"asin": item, "category": ["a"], "imageURL": ["u"]} for item in "xyz"),
    },
    "amazon_2023": {
        "r.jsonl": json_lines(dict(zip(("user_id", "parent_asin", "timestamp", "rating"), row)) for row in REVIEWS),
        "m.jsonl": json_lines(META | {"parent_asin": item} for item in "xyz"),
    },
    "amazon_2023, tables": {
        "r.csv": text_table(",", ("user_id", "parent_asin", "timestamp", "rating"), *REVIEWS),
        "m.parquet": parquet({"parent_asin": list("xyz"), "title": ["T"] * 3, "details": ['{"Brand": "b"}'] * 3,
                              "images": [{"large": ["u"], "variant": ["MAIN"]}] * 3, "features": [["f"]] * 3}),
    },
    "movielens 1m": {"ratings.dat": text_table("::", *((u, i, r, t) for u, i, t, r in REVIEWS)),
                     "movies.dat": b"x::X (1999)::Drama|War\ny::Y::Comedy\n"},
    "movielens 100k": {"u.data": text_table("\t", *((u, i, r, t) for u, i, t, r in REVIEWS)),
                       "u.item": "".join(f"{i}|T|d||u|{'|'.join('01' * 9 + '1')}\n" for i in "xyz").encode()},
    "table, safetensors": {},
    "table of one's own": {},
    "table, npy": {"t.npy": array("f4")},
    "table, parquet": {"t.parquet": parquet({"item_id": list("zxyw"), "embedding": [[1.0, 2.0]] * 4})},
    "pictures": PICTURES,
    "archive, zip": {"a.zip": zipped(ARCHIVED)},
    "archive, tar": {"a.tar": tarred(ARCHIVED, "w")},
    "archive, tgz": {"a.tgz": tarred(ARCHIVED, "w:gz")},
    "histories": {"h.jsonl": json_lines([["x", "y"], {"user_id": "a", "history": ["z"]}, ["y"]])},
    "histories, parquet": {"h.parquet": parquet({"user_id": ["a", "b"], "history": [["x"], ["y", "z"]]})},
    "prepared": {},
}  # fmt: skip


def read(name: str, folder: Path, on_bad_row: str) -> None:
    """Reads the folder, which holds files as those of this name, as a stage would."""
    kind, _, form = name.partition(", ")
    paths = {path.name.split(".")[0]: str(path) for path in folder.iterdir()}
    settings = {"on_bad_row": on_bad_row}
    if kind in ("sequences", "movielens 1m", "movielens 100k"):
        prepare_source(reader_of(kind.split()[0])(folder, **settings), on_bad_image="missing")
    elif kind.startswith("amazon"):
        source = reader_of(kind)(TableLocation(paths["r"]), TableLocation(paths["m"]), **settings)
        prepare_source(source, on_bad_image="missing")
    elif kind in ("csv", "text without header", "atomic", "lines", "parquet"):
        chosen = {"user_id": "1", "item_id": "2", "timestamp": "3"} if "without" in kind else {"rating": "rating"}
        items = TableLocation(paths["i"]) if "i" in paths else None
        chosen = {} if form == "gzipped" else chosen
        source = reader_of("tabular")(TableLocation(paths["o"]), items, columns=chosen, **settings)
        prepare_source(source, on_bad_image="missing")
    elif name == "table, safetensors":
        load_table(folder / "text.safetensors", "text", 3)
    elif kind.startswith("table"):
        (path,) = folder.iterdir()
        import_table(path, "text", 4, ["", *"wxyz"])
    elif kind == "pictures":
        for path in folder.iterdir():
            decode_image(path.read_bytes())
    elif kind == "archive":
        (path,) = folder.iterdir()
        list_images(path, folder)
    elif kind == "histories":
        (path,) = folder.iterdir()
        known_histories(read_histories(path), list("xyz"), "skip" if on_bad_row == "skip" else "error")
    else:
        data = PreparedDataset.load(folder)
        for split in SEQUENCE_FILES:
            data.sequences(split)
        assert len(data.titles) == len(data.texts) == data.num_items + 1


def data_readers(root: Path) -> dict[str, list[tuple[Path, list[str], Callable[[Path, random.Random], object]]]]:
    """By its name, what a reader of data reads: folders below `root`, the files in it that are changed, the call."""
    files = FILES | {f"pictures {name}": {name: data} for name, data in FILES["pictures"].items()}
    for name, of_one in files.items():
        for file, data in of_one.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(data)
    for name in ("table, safetensors", "table of one's own"):
        (root / name).mkdir()
    present = torch.tensor([False, True, True, False])
    table = {"text": torch.ones(4, 2) * present[:, None], "present": present}
    save_file(table, root / "table, safetensors" / "text.safetensors")
    save_file({"text": torch.ones(5, 2)}, root / "table of one's own" / "own.safetensors")
    prepare_source(make_source()).save(root / "prepared")
    changed = {
        "prepared": ["items.parquet", "statistics.json", *SEQUENCE_FILES.values()],
        "parquet, items": ["i.parquet"],
    }

    def reader(name: str, folder: str) -> tuple:
        def call(directory: Path, draw: random.Random) -> None:
            read(name, directory, draw.choice(["error", "skip"]))

        return root / folder, changed.get(name, sorted(path.name for path in (root / folder).iterdir())), call

    pictures = [name for name in files if name.startswith("pictures ")]
    return {name: [reader(name, one) for one in (pictures if name == "pictures" else [name])] for name in FILES}

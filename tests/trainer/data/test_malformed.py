"""
Malformed files of every kind that the data come in: each is read, or refused in a sentence that names it, soon, within
two gibibytes, and without a file written elsewhere. `make fuzz` draws thousands of new ones for each reader.
"""

import gzip
import io
import json
import os
import random
import resource
import signal
import tarfile
import time
import traceback
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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

from .test_prepared import make_source


SECONDS, BYTES = 5.0, 2**31
# Of each reader: as many in every run, and new ones in a run that looks for them.
FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
INPUTS = int(os.environ.get("FUZZ_INPUTS", 4500)) if FUZZ else 12

REVIEWS = [
    (user, item, 1_500_000_000 + 7 * n, n % 5 + 1) for n, (user, item) in enumerate(zip("abcab" * 4, "xyzzy" * 4))
]
ODD_VALUES = [
    None, True, 0, -1, 5, 2**63, 10**30, 10**400, 1e300, -0.0, float("nan"), float("inf"), "", " ", "\ud83d", "\x00",
    "x" * 9999,
    "../../x", "/dev/zero", "http://10.0.0.1/x", "2020-09-15", "15/09/2020 05:59", "<a" * 999,
    "&#9999999999;", [], {}, [None],
    ["a", 1], {"a": [1]}, {"": None}, [[["x"]]], "49.0", "1e5", "٣",
]  # fmt: skip
ODD_BYTES = [
    b"", b"\n", b"\r", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\\", b",", b";", b"\t", b"::", b"|",
    b"{",
    b"}", b"[" * 3000,
    b"9" * 5000, b"1e999", b"-", b"NaN", b"\xf0\x9f", b"\\ud83d", b"null", b"true", b"x" * 70_000,
    b"{'a': " * 200, b"\x1f\x8b", b"PK\x03\x04",
]  # fmt: skip


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


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


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
    """Reads the folder as a stage would."""
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


def odd_json(value, rng: random.Random):
    """The value with something else in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {key: one for key, one in value.items() if key != name}
        return value | {name: odd_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], odd_json(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD_VALUES)


def odd_line(data: bytes, rng: random.Random) -> bytes:
    """Lines of which one holds something else in one place."""
    lines = data.splitlines(keepends=True) or [b""]
    place = rng.randrange(len(lines))
    try:
        lines[place] = json.dumps(odd_json(json.loads(lines[place]), rng)).encode() + b"\n"
    except ValueError:
        separator = next((one for one in (b"::", b"\t", b",", b"|", b" ") if one in lines[place]), b",")
        cells = lines[place].rstrip(b"\n").split(separator)
        odd = str(rng.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
        cells[rng.randrange(len(cells))] = rng.choice([odd, rng.choice(ODD_BYTES)])
        lines[place] = separator.join(cells) + b"\n"
    return b"".join(lines)


def odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are others, lacking, there twice or strange."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        stop = min(start + rng.choice([0, 1, 2, 8, 60]), len(data))
        put = rng.choice([b"", rng.randbytes(stop - start), rng.choice(ODD_BYTES), data[start:stop] * 2])
        data = data[:start] + put + data[stop:] if rng.random() < 0.9 else data[:start]
    return data


def odd_column(data: bytes, rng: random.Random) -> bytes:
    """A Parquet file with a column of another kind, or none, or with gaps."""
    table = pq.read_table(io.BytesIO(data))
    if len(table) == 0:
        return odd_bytes(data, rng)
    place = rng.randrange(table.num_columns)
    values = table.column(place).to_pylist()
    if rng.random() < 0.1:
        table = table.remove_column(place)
    else:
        odd = rng.choice(ODD_VALUES)
        if rng.random() < 0.5:
            values = [odd] * len(values)
        values[rng.randrange(len(values))] = rng.choice([None, odd])
        try:
            table = table.set_column(place, table.column_names[place], pa.array(values))
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            return odd_bytes(data, rng)
    file = io.BytesIO()
    try:
        pq.write_table(table, file)
    except pa.ArrowNotImplementedError:
        return odd_bytes(data, rng)
    return file.getvalue()


def malformed(name: str, data: bytes, rng: random.Random) -> bytes:
    chance = rng.random()
    if name.endswith(".gz") and chance < 0.7:
        return gzip.compress(malformed(name[:-3], gzip.decompress(data), rng))
    if name.endswith(".csv.zip") and chance < 0.7:
        return zipped({"o.csv": malformed("o.csv", TABLE, rng)})
    if name.endswith(".parquet") and chance < 0.6:
        return odd_column(data, rng)
    if name.endswith((".csv", ".jsonl", ".json", ".txt", ".dat", ".data", ".inter", ".item")) and chance < 0.6:
        return odd_line(data, rng)
    return odd_bytes(data, rng)


@contextmanager
def bounded():
    """Ends in `TimeoutError` what lasts longer than it may, and in `MemoryError` what takes more than it may."""

    def too_long(*arguments):
        raise TimeoutError(f"more than {SECONDS:g} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS * 12)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("sound")
    present = torch.tensor([False, True, True, False])
    save_file({"text": torch.ones(4, 2) * present[:, None], "present": present}, folder / "text.safetensors")
    table = {"text.safetensors": (folder / "text.safetensors").read_bytes()}
    save_file({"text": torch.ones(5, 2)}, folder / "own.safetensors")
    prepare_source(make_source()).save(folder / "prepared")
    names = ["items.parquet", "statistics.json", *SEQUENCE_FILES.values()]
    return FILES | {
        "table, safetensors": table,
        "table of one's own": {"own.safetensors": (folder / "own.safetensors").read_bytes()},
        "prepared": {name: (folder / "prepared" / name).read_bytes() for name in names},
    }


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", FILES)
def test_malformed_files_are_read_or_refused_in_a_sentence(name, sound_files, tmp_path, capsys):
    start = random.SystemRandom().randrange(2**32) if FUZZ else 0
    outcomes: Counter[str] = Counter()
    faults: dict[str, str] = {}
    # `datasets` makes a file of each table that it loads.
    for seed in range(start, start + (INPUTS // 10 + 2 if name == "parquet, items" else INPUTS)):
        rng = random.Random(f"{name} {seed}")
        files = dict(sound_files[name])
        if name == "pictures":
            files = dict([rng.choice(list(files.items()))])
        if seed != start:
            chosen = "i.parquet" if "i.parquet" in files else rng.choice(list(files))
            files[chosen] = malformed(chosen, files[chosen], rng)
        folder = tmp_path / f"{seed}"
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        began = time.process_time()
        try:
            with bounded():
                read(name, folder, rng.choice(["error", "skip"]))
            outcome = "read"
        except (ValueError, FileNotFoundError) as error:
            outcome = "refused"
            if "\n" in str(error).strip() or len(str(error)) > 2000:
                outcome, faults[f"no sentence: {str(error)[:200]!r}"] = "fault", f"{seed}"
            if isinstance(error, UnicodeError | json.JSONDecodeError):
                outcome, faults[f"not named: {error!r:.200}"] = "fault", f"{seed}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome, faults[f"{type(error).__name__}: {error!s:.200} ({place.filename}, {place.lineno})"] = (
                "fault",
                f"{seed}",
            )
        if time.process_time() - began > SECONDS:
            outcome, faults[f"{time.process_time() - began:.1f} s"] = "fault", f"{seed}"
        outcomes[outcome] += 1
        assert seed != start or outcome == "read", faults
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() or file.is_symlink() else file.rmdir()
        folder.rmdir()
        assert not list(tmp_path.iterdir()), f"seed {seed} wrote elsewhere"
    if FUZZ:
        with capsys.disabled():
            print(f"\n{name}: {dict(outcomes)}, from seed {start}", end="")
    assert not faults, "\n".join(f"seed {seed}: {fault}" for fault, seed in faults.items())

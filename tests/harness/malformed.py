"""Damaged and hostile forms of a file, by the kind that its name tells."""

import gzip
import io
import json
import math
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq


ODD_VALUES = [
    None, True, False, 0, -1, 1, 2, 5, 3.5, -0.5, -0.0, 10**4, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, 1e300,
    math.nan, math.inf,
    "", " ", "x", "\x00", "\ud83d", "x" * 9999, "../x", "/etc/passwd", "/dev/zero", "http://10.0.0.1/x", "2020-09-15",
    "15/09/2020 05:59", "<a" * 999, "&#9999999999;", "49.0", "1e5", "٣",
    [], {}, [None], [1], [[]], ["x", "x"], ["a", 1], [10**9] * 3, {"x": 1}, {"a": [1]}, {"": {}}, {"": None},
]  # fmt: skip
ODD_NAMES = ["x", "", "auto_map", "__class__", "_name_or_path"]
ODD_BYTES = [
    b"", b"\n", b"\r", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\\", b",", b";", b"\t", b"::", b"|", b"{",
    b"}", b"-", b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"{'a': " * 200, b"&a [*a]", b"9" * 400, b"9" * 5000,
    b"1e999", b"NaN", b"null", b"true", b"\xf0\x9f", b"\\ud83d", b"x" * 70_000, b"\x1f\x8b", b"PK\x03\x04",
]  # fmt: skip
OF_LINES = (".csv", ".jsonl", ".json", ".txt", ".dat", ".data", ".inter", ".item")


def malformed(name: str, data: bytes, draw: random.Random) -> bytes:
    """The content of a file of this name with one to three changes, most of which leave its format whole."""
    chance = draw.random()
    if name.endswith(".gz") and chance < 0.7:
        return gzip.compress(malformed(name[:-3], gzip.decompress(data), draw))
    if name.endswith(".csv.zip") and chance < 0.7:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return zipped({one: malformed(one, archive.read(one), draw) for one in archive.namelist()})
    if name.endswith(".parquet") and chance < 0.6:
        return _odd_column(data, draw)
    for _ in range(draw.choice([1, 1, 2, 3])):
        data = (_odd_line if name.endswith(OF_LINES) and draw.random() < 0.6 else _odd_bytes)(data, draw)
    return data


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def _odd_json(value, draw: random.Random):
    """The value of which one member, at any depth, is something else, is gone, is there often, or is new."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name, chance = draw.choice(list(value)), draw.random()
        if chance < 0.1:
            return {key: one for key, one in value.items() if key != name}
        if chance < 0.2:
            return value | {draw.choice([*ODD_NAMES, name.upper()]): draw.choice(ODD_VALUES)}
        return value | {name: _odd_json(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place, chance = draw.randrange(len(value)), draw.random()
        if chance < 0.1:
            return value[:place] + value[place + 1 :]
        if chance < 0.2:
            return value + value[place : place + 1] * draw.choice([1, 1000])
        return [*value[:place], _odd_json(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD_VALUES)


def _odd_text(text: bytes, draw: random.Random) -> bytes:
    return json.dumps(_odd_json(json.loads(text), draw)).encode("utf-8", "surrogatepass")


def _odd_line(data: bytes, draw: random.Random) -> bytes:
    """A JSON value, or lines of which one, that holds something else in one place."""
    try:
        return _odd_text(data, draw)
    except (ValueError, RecursionError):
        pass
    lines = data.splitlines(keepends=True) or [b""]
    place = draw.randrange(len(lines))
    try:
        lines[place] = _odd_text(lines[place], draw) + b"\n"
    except (ValueError, RecursionError):
        separator = next((one for one in (b"::", b"\t", b",", b"|", b" ") if one in lines[place]), b",")
        cells = lines[place].rstrip(b"\n").split(separator)
        odd = str(draw.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
        cells[draw.randrange(len(cells))] = draw.choice([odd, draw.choice(ODD_BYTES)])
        lines[place] = separator.join(cells) + b"\n"
    return b"".join(lines)


def _odd_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are others, lacking, there twice, turned round or strange, or whose end is lacking."""
    start = draw.randint(0, len(data))
    part = data[start : start + draw.choice([0, 1, 2, 8, 60])]
    put = draw.choice(
        [b"", draw.randbytes(len(part)), draw.choice(ODD_BYTES), draw.choice(ODD_BYTES), part * 2, part[::-1]]
    )
    return data[:start] if draw.random() < 0.1 else data[:start] + put + data[start + len(part) :]


def _odd_column(data: bytes, draw: random.Random) -> bytes:
    """A Parquet file with a column of another kind, or none, or with gaps."""
    table = pq.read_table(io.BytesIO(data))
    if len(table) == 0:
        return _odd_bytes(data, draw)
    place = draw.randrange(table.num_columns)
    values = table.column(place).to_pylist()
    file = io.BytesIO()
    try:
        if draw.random() < 0.1:
            table = table.remove_column(place)
        else:
            odd = draw.choice(ODD_VALUES)
            if draw.random() < 0.5:
                values = [odd] * len(values)
            values[draw.randrange(len(values))] = draw.choice([None, odd])
            table = table.set_column(place, table.column_names[place], pa.array(values))
        pq.write_table(table, file)
    # No column can hold these values.
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return _odd_bytes(data, draw)
    return file.getvalue()

"""Files of raw data: where they come from, and their lines with the place to name if one is wrong."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import parse_hf_uri
from tqdm.auto import tqdm


def local_file(location: str | Path) -> Path:
    """
    The file at a location on this machine; `hf://datasets/owner/name[@revision]/path` is downloaded into the cache of
    `huggingface_hub` first.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if str(location).startswith("hf://"):
        uri = parse_hf_uri(str(location))
        return Path(hf_hub_download(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision))
    path = Path(location)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; correct the path, or download the file first.")
    return path


def place(path: Path, number: int) -> str:
    """How a line is called in an error."""
    return f"'{path}', line {number}"


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """
    Yields every line of a file, gzipped if its name says so, with its number from 1 and without its end.

    Raises:
        ValueError: If a line is not in the encoding, or the archive is damaged.
    """
    number = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            for number, line in enumerate(tqdm(file, desc=path.name, unit=" lines", delay=2), start=1):
                yield number, line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place(path, number)} is not {encoding.upper()} ({error.reason} at byte {error.start}); convert the "
                "file."
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"'{path}' is damaged after line {number} ({error}); download or write it again."
            ) from error


def parse_json(line: str, path: Path, number: int) -> dict:
    """
    The JSON object of a line.

    Raises:
        ValueError: If the line holds anything else.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place(path, number)} is not JSON ({error.msg} at column {error.colno}); write one JSON object a line."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{place(path, number)} holds {type(value).__name__}, not a JSON object; write one JSON object a line."
        )
    return value


def require(fields: dict, names: tuple[str, ...] | list[str], path: Path, number: int) -> None:
    """
    Checks that a line has the fields of these names.

    Raises:
        ValueError: If it lacks one; the sentence lists those it has.
    """
    for name in names:
        if name not in fields:
            raise ValueError(
                f"{place(path, number)} has no field '{name}', only {', '.join(fields) or 'none at all'}; add it or "
                "name another."
            )


def raw_id(value, field: str, path: Path, number: int) -> str:
    """
    A raw id as a string.

    Raises:
        ValueError: If it is neither an integer nor a string, or is empty.
    """
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"{place(path, number)} has {field}={value!r}; an id is an integer or a string.")
    return str(value)

"""Files of raw data: where they come from, and their lines with what to call one that is wrong."""

import gzip
import io
import itertools
import json
import lzma
import re
import reprlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import parse_hf_uri
from tqdm.auto import tqdm


# Bytes of a line. Longer ones are no rows of a table, and a few bytes of an archive may unpack to gigabytes.
MAX_LINE = 2**24
# What damaged or encrypted archives raise; OSError and ValueError in bzip2.
DAMAGE = (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, RuntimeError, NotImplementedError)

BAD_ROW_ACTIONS = ("error", "skip")
# Skipped rows that are told.
_EXAMPLES = 5

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOLDER = re.compile(r"^'.*/(?=[^/']+')")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value) -> str:
    """A value as the part of a sentence: a few dozen characters at most, however large or deep it is."""
    return _SHORT.repr(value)


def listed(names: Iterable[str]) -> str:
    """Names as the part of a sentence, a dozen of them at most."""
    names = [name if len(name) <= 80 and name.isprintable() else shown(name) for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


class BadRows:
    """
    What happens to rows that cannot be read: `"error"` stops at the first, `"skip"` leaves them out.

    Attributes:
        counts (`Counter[str]`): How many were left out, by table.
        examples (`list[str]`): What was wrong with the first of them.
    """

    def __init__(self, action: str = "error"):
        if action not in BAD_ROW_ACTIONS:
            raise ValueError(f"on_bad_row is {action!r}; choose one of {', '.join(BAD_ROW_ACTIONS)}.")
        self.action = action
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def refuse(self, table: str, error: ValueError) -> None:
        """Leaves out a row of a table (`"interactions"`, `"sequences"` or `"items"`), or raises the error, which says
        why."""
        if self.action == "error":
            raise ValueError(
                f"{str(error).rstrip('.')}, or set on_bad_row to 'skip' to leave such rows out."
            ) from error
        self.counts[table] += 1
        if len(self.examples) < _EXAMPLES:
            # Where the file lay is nobody's business who gets the data.
            self.examples.append(_FOLDER.sub("'", str(error)))


@contextmanager
def on_the_hub(location: str) -> Iterator[None]:
    """Surrounds what asks the Hub for a thing that is not on this machine, perhaps because its path is mistyped:
    `FileNotFoundError` if the Hub cannot be reached or does not have it."""
    try:
        yield
    except (OSError, HFValidationError, httpx2.TransportError) as error:
        if isinstance(error, HfHubHTTPError):
            reason = f"it answers {error.response.status_code}"
        else:
            reason = one_line(error)
        raise FileNotFoundError(
            f"'{location}' is not on this machine, and the Hub at {constants.ENDPOINT} does not give it ({reason}); "
            "correct the path or name, or look at the network and at your login (`hf auth login`)."
        ) from error


def one_line(error: BaseException) -> str:
    """An error of a library as the part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def local_file(location: str | Path) -> Path:
    """The file at a location on this machine, or of `hf://datasets/owner/name[@revision]/path` in the cache of
    `huggingface_hub`; raises `FileNotFoundError` if there is none."""
    if str(location).startswith("hf://"):
        uri = parse_hf_uri(str(location))
        with on_the_hub(str(location)):
            return Path(hf_hub_download(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision))
    path = Path(location)
    require_regular(path)
    return path


def require_regular(path: Path) -> None:
    """Raises `FileNotFoundError` if there is no regular file: a pipe or a device would be read without end."""
    if path.is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f"'{path}' is a folder; name a file in it.")
    if path.exists():
        raise FileNotFoundError(f"'{path}' is no regular file; write what comes from a pipe or a device to a file.")
    raise FileNotFoundError(f"'{path}' does not exist; correct the path, or download the file first.")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """
    The bytes of a file, unpacked as they are read if its name says that it is gzipped or a zip archive of one file.

    Raises:
        ValueError: If the archive is damaged, encrypted, or holds more than one file.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                # Lines come out of C this way.
                yield io.BufferedReader(packed, 2**18)
        elif suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                files = [one for one in archive.infolist() if not one.is_dir() and "__MACOSX/" not in one.filename]
                if len(files) != 1:
                    raise ValueError(f"'{path}' holds {len(files)} files where one table is read; unpack it.")
                with archive.open(files[0]) as member:
                    yield io.BufferedReader(member, 2**18)  # type: ignore[type-var]
        else:
            with open(path, "rb") as file:
                yield file
    except DAMAGE as error:
        raise ValueError(f"'{path}' cannot be read ({one_line(error)}); download or write it again.") from error


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Yields every line of a file, see [`opened`]: what errors call it, and what it says without its end. Raises
    `ValueError` if it is not in the encoding or longer than `MAX_LINE` bytes, or the archive is damaged."""
    number, place, most = 0, f"'{path}', line ", MAX_LINE
    with opened(path) as file:
        try:
            first = file.readline(most + 1).removeprefix(_BYTE_ORDER_MARK)
            lines = itertools.chain([first] if first else [], iter(partial(file.readline, most + 1), b""))
            for number, line in enumerate(tqdm(lines, desc=path.name, unit=" lines", delay=2), start=1):
                if len(line) > most:
                    raise ValueError(f"{place}{number} is longer than {most:,} bytes; write one row per line.")
                yield f"{place}{number}", line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"'{path}', line {number} is not {encoding.upper()} ({error.reason} at byte {error.start}); convert "
                "the file."
            ) from error
        except DAMAGE as error:
            raise ValueError(
                f"'{path}' is damaged after line {number} ({one_line(error)}); download or write it again."
            ) from error


def parse_json(line: str, where: str) -> dict:
    """The JSON object of a line; raises `ValueError` if it holds anything else."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); write one JSON object per line."
        ) from error
    # A number of thousands of digits, or lists in lists in lists.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read ({one_line(error)}); write one JSON object per line.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, not a JSON object; write one JSON object per line.")
    return value


def require(fields: dict, names: Iterable[str], where: str) -> None:
    """Raises `ValueError` if a line lacks the field of one of these names."""
    for name in names:
        if name not in fields:
            raise ValueError(
                f"{where} has no field '{name}', only {listed(fields) or 'none at all'}; add it or name another."
            )


def raw_id(value, field: str, where: str) -> str:
    """A raw id as a string; raises `ValueError` if it is neither an integer nor a string, or is empty. A float without
    a fraction is the integer that it was before a table with gaps was read."""
    if type(value) is str and value and value.isascii():
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"{where} has {field}={shown(value)}; an id is an integer or a string.")
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has {field}={shown(value)}, half a character; write the id again.") from error
    return text

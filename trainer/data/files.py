"""Files of raw data: where they come from, and their lines with what to call one that is wrong."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import parse_hf_uri
from tqdm.auto import tqdm


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
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; correct the path, or download the file first.")
    return path


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Yields every line of a file, gzipped if its name says so: what errors call it, and what it says without its end.
    Raises `ValueError` if it is not in the encoding, or the archive is damaged."""
    number = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            for number, line in enumerate(tqdm(file, desc=path.name, unit=" lines", delay=2), start=1):
                yield f"'{path}', line {number}", line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"'{path}', line {number} is not {encoding.upper()} ({error.reason} at byte {error.start}); convert "
                "the file."
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"'{path}' is damaged after line {number} ({error}); download or write it again."
            ) from error


def parse_json(line: str, where: str) -> dict:
    """The JSON object of a line; raises `ValueError` if it holds anything else."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); write one JSON object per line."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, not a JSON object; write one JSON object per line.")
    return value


def require(fields: dict, names: Iterable[str], where: str) -> None:
    """Raises `ValueError` if a line lacks the field of one of these names."""
    for name in names:
        if name not in fields:
            raise ValueError(
                f"{where} has no field '{name}', only {', '.join(fields) or 'none at all'}; add it or name another."
            )


def raw_id(value, field: str, where: str) -> str:
    """A raw id as a string; raises `ValueError` if it is neither an integer nor a string, or is empty."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"{where} has {field}={value!r}; an id is an integer or a string.")
    return str(value)

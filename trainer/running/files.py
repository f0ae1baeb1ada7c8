"""Files that people and stages write: YAML, turned into flags so that what a file says is checked as what a flag says,
and JSON. Neither is larger or deeper than its reader can bear; what does not fit is named in a sentence."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Container, Iterator
from pathlib import Path

import yaml


# Settings are written by hand; records and configurations hold numbers of a training at most.
MOST_YAML_BYTES = 2**20
MOST_YAML_VALUES = 100_000
MOST_YAML_BRACKETS = 100
MOST_JSON_BYTES = 2**26


def read_yaml(path: Path, what: str):
    """The content of a YAML file, which errors call `what`; raises `FileNotFoundError` if there is no such file, and
    `ValueError` if it is not YAML in UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} '{path}'; correct the path, relative to '{Path.cwd()}'.")
    require_size(path, MOST_YAML_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
        _require_flat(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if _num_values(node, {}) > MOST_YAML_VALUES:
            raise ValueError(f"'{path}' has more than {MOST_YAML_VALUES:,} values, aliases counted; write it shorter.")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"'{path}' is nested too deeply to be read; write it flatter.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}.") from error


def _require_flat(text: str) -> None:
    """Raises `RecursionError` for brackets so deep that the scanner of YAML would take minutes for them."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MOST_YAML_BRACKETS:
            raise RecursionError


def _num_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Values of a YAML document when every alias is what it stands for: as a copy counts it, not as memory holds it. A
    node inside itself has infinitely many."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        members = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_num_values(one, known) for one in members)
    return known[id(node)]


def read_json(path: str | os.PathLike) -> dict:
    """The object that a JSON file holds; raises `FileNotFoundError` if there is no such file, and `ValueError` if it
    holds none, is larger than 64 MiB or nested too deeply."""
    path = Path(path)
    require_size(path, MOST_JSON_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"'{path}' is nested too deeply to be read; write it again.") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON in UTF-8 ({error}); write it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds no JSON object; write it again.")
    return value


def require_size(path: Path, most: int) -> None:
    """Raises `ValueError` if a file is larger."""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"'{path}' has {size:,} bytes, and such a file has {most:,} at most; name another file.")


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def told_of_a_full_disk(directory: str | os.PathLike) -> Iterator[None]:
    """Makes one `OSError` with a sentence of what libraries raise when a disk is full while a stage writes to the
    directory, or when a file is not open to the user."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise OSError(
                f"No room is left on a disk that '{directory}' or the temporary files are on; make room and start the "
                "same command again: it goes on from what was written whole."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(
                f"'{error.filename or directory}' is not open to you ({error.strerror}); change its "
                "permissions, or choose another directory."
            ) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk, a quota or a limit of the file size."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # Libraries that are not written in Python tell it in words: safetensors, and the writer of torch.
        words = (
            "No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed",
            "unexpected pos", "iostream error",
        )  # fmt: skip
        if any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_names(settings: dict, known: Container[str], where: str, stage: str) -> None:
    """Raises `ValueError` if a setting is none of the stage's known ones."""
    for name in settings:
        if name not in known:
            raise ValueError(f"{where} sets '{name}', which the stage does not have; see `mmesid {stage} --help`.")


def to_flags(settings: dict) -> list[str]:
    """Settings as flags; one that is null is left out, and an empty list is a flag without a value."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return flags

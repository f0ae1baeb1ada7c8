"""Code that comes with a model: that it is the code of the commit which somebody has read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from ..data.files import on_the_hub


# Files that name classes: of transformers under `auto_map`, of sentence-transformers as the `type` of a module.
PATTERNS = ("*config*.json", "*modules.json")


def refuse_unpinned_code(name_or_path: str, revision: str | None) -> None:
    """Raises `ValueError` for a repository on the Hub without the full hash of a commit."""
    if not Path(name_or_path).is_dir() and re.fullmatch("[0-9a-f]{40}", revision or "") is None:
        raise ValueError(
            f"trust_remote_code runs code from '{name_or_path}', which its owner can change at any time; pin what you "
            f"have read with a full commit hash as revision instead of {revision!r}."
        )


def refuse_foreign_code(name_or_path: str, revision: str | None = None) -> None:
    """
    Refuses a model whose files name classes of other repositories, as `other/repository--module.Class`: `transformers`
    loads these from wherever the other repository's main branch stands, whatever commit the model is pinned to.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        with on_the_hub(name_or_path):
            folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=list(PATTERNS)))
    for file in sorted(file for pattern in PATTERNS for file in folder.rglob(pattern)):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{file}' is not JSON ({error}); name a complete checkpoint.") from error
        for reference in _class_references(content):
            repository, separator, _ = reference.partition("--")
            if separator and repository != name_or_path:
                raise ValueError(
                    f"'{file.relative_to(folder).as_posix()}' of '{name_or_path}' names code of '{repository}', whose "
                    f"owner can change it at any time ('{reference}'); copy the code you have read beside the model, "
                    "name it there without the repository, and load the model from that directory."
                )


def _class_references(content, named: bool = False) -> Iterator[str]:
    """The texts under `auto_map` or `type`, at any depth; all of them where these already name the content."""
    if isinstance(content, str) and named:
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _class_references(value, named or key in ("auto_map", "type"))
    elif isinstance(content, list):
        for element in content:
            yield from _class_references(element, named)

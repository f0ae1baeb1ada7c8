"""What of a stage's directory goes to the Hub, and how it gets there: for `mmesid push` and for the trainers."""

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token

from mmesid.hub_cards import render_card, save_card
from modeling_mmesid.checkpoints import (
    CARD_NAME,
    LINKS,
    RESULTS_NAME,
    file_digest,
    require_public_base_model,
    results_text,
)

from ..running.records import RECORD_NAME, StageRecord, write_text_atomic


# What the result of each stage is on the Hub.
REPO_TYPES = {"prepare": "dataset", "sasrec": "model", "encoder": "model", "quantize": "model", "finetune": "model"}


def add_metrics(directory: str | os.PathLike, metrics: dict) -> None:
    """Adds what was measured later to the record and the card of a stage's directory."""
    directory = Path(directory)
    record = StageRecord.load(directory)
    record.metrics |= metrics
    record.outputs[CARD_NAME] = file_digest(save_card(directory, dataclasses.asdict(record)))
    write_text_atomic(directory / RECORD_NAME, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def is_card_edited(directory: Path, record: StageRecord) -> bool:
    """Whether somebody changed the card since it was written from the record."""
    return file_digest(directory / CARD_NAME) != record.outputs[CARD_NAME]


def parse_links(links: list[str] | None, flag: str) -> dict[str, str]:
    """
    Related repositories by kind, from `kind=owner/name` each; `flag` is what they were given as.

    Raises:
        ValueError: If a link does not have that form, or its kind is unknown.
    """
    parsed = {}
    for link in links or []:
        kind, _, name = link.partition("=")
        if kind not in LINKS or name.count("/") != 1:
            raise ValueError(
                f"{flag} {link} does not have the form kind=owner/name, with a kind of {', '.join(LINKS)}."
            )
        parsed[kind] = name
    return parsed


def publication(
    directory: str | os.PathLike, repo_id: str, links: dict[str, str] | None = None
) -> tuple[str, dict[str, Path | bytes]]:
    """
    What of a stage's directory goes to the Hub: the files that the stage wrote, what was measured, and the card, with
    the repository's name in its code and links to related ones. A card that was edited by hand goes as it is. The
    record stays behind.

    Args:
        directory (`str` or `os.PathLike`): The directory of a stage that has finished.
        repo_id (`str`): The repository it goes to.
        links (`dict[str, str]`, *optional*): Related repositories by kind, see [`hub_cards.render_card`].

    Returns:
        `tuple[str, dict[str, Path | bytes]]`: The type of the repository (`"model"` or `"dataset"`), and path or
            content of every file by its name in the repository.

    Raises:
        FileNotFoundError: If no stage wrote the directory, or a file that it wrote is gone.
        ValueError: If the stage is none whose result is published, or a file holds what is private.
    """
    directory = Path(directory)
    if not (directory / RECORD_NAME).is_file():
        raise FileNotFoundError(
            f"'{directory}' has no {RECORD_NAME}; give the directory of a stage that has finished."
        )
    record = StageRecord.load(directory)
    if record.stage not in REPO_TYPES:
        raise ValueError(
            f"'{directory}' was written by the stage '{record.stage}'; what goes to the Hub comes from "
            f"{', '.join(REPO_TYPES)}."
        )
    for name in record.outputs:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"'{directory / name}' is gone; run `mmesid {record.stage}` again.")
    files: dict[str, Path | bytes] = {name: directory / name for name in record.outputs}
    if not is_card_edited(directory, record):
        files[CARD_NAME] = render_card(dataclasses.asdict(record), repo_id, links).encode()
    if record.metrics:
        files[RESULTS_NAME] = results_text(record.metrics).encode()
    check_private(directory, files)
    return REPO_TYPES[record.stage], dict(sorted(files.items()))


def check_private(directory: Path, files: dict[str, Path | bytes]) -> None:
    """
    Raises:
        ValueError: If a file holds the token, or the path of a directory of this machine.
    """
    if "config.json" in files:
        content = files["config.json"]
        config = json.loads(content if isinstance(content, bytes) else content.read_bytes())
        require_public_base_model(config.get("base_model_name_or_path"))
    paths = {str(path) for path in (Path.home(), Path.cwd(), directory.resolve()) if len(path.parts) > 1}
    private = [("a directory of this machine", _path_pattern(path)) for path in sorted(paths)]
    if (token := get_token()) is not None:
        private.append(("your token for the Hub", re.compile(re.escape(token.encode()))))
    for name, content in files.items():
        for what, pattern in private:
            if _holds(content, pattern):
                raise ValueError(f"'{name}' of '{directory}' holds {what}; take it out before others read it.")


def _path_pattern(path: str) -> re.Pattern[bytes]:
    """The path alone or with more behind it, but not as the beginning of a longer name. A short one, such as `/root`,
    turns up by chance among the bytes of large weights, and counts with a slash behind it alone."""
    return re.compile(re.escape(path.encode()) + (rb"(?![\w-])" if len(path) > 5 else b"/"))


def _holds(content: Path | bytes, pattern: re.Pattern[bytes], block_size: int = 2**24, overlap: int = 2**12) -> bool:
    if isinstance(content, bytes):
        return pattern.search(content) is not None
    with open(content, "rb") as file:
        tail = b""
        while block := file.read(block_size):
            if pattern.search(tail + block):
                return True
            tail = block[-overlap:]
    return False


def upload(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    token: str | None = None,
) -> CommitInfo:
    """
    Makes repository and branch where they are missing and sends the files in one commit. Large files that an earlier
    call sent before it broke off, and files that have not changed, are not sent again.

    Args:
        files (`dict[str, Path | bytes]`): Path or content of every file by its name in the repository.
        repo_id (`str`): The repository, owner/name.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): Whether a new repository is private; by default as the account is set up.
        revision (`str`, *optional*): The branch; `main` by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of changing the branch.
        commit_message (`str`): Message of the commit.
        token (`str`, *optional*): A token that may write; by default that of `hf auth login` or HF_TOKEN.

    Returns:
        [`~huggingface_hub.CommitInfo`].
    """
    api = HfApi(token=token)
    # A pull request needs no right to write, which making the repository would ask for.
    if not (create_pr and api.repo_exists(repo_id, repo_type=repo_type)):
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    with warnings.catch_warnings():
        # Semantic IDs belong to the model that made them.
        warnings.filterwarnings("ignore", message=".*about to commit a data file", category=UserWarning)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

"""What of a stage's directory a repository on the Hub holds, decided once: for `mmesid push`, for the trainers, and,
through the list of companions, for the models' own `push_to_hub`."""

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from mmesid.hub_cards import CARD_NAME, REPOSITORY, SUBJECTS, render_card, save_card
from modeling_mmesid.checkpoints import COMPANIONS_NAME, file_digest, require_public_base_model

from ..running.records import RECORD_NAME, RESULTS_NAME, StageRecord, StageRun, write_text_atomic


def present(run: StageRun, links: dict[str, str] | None = None) -> None:
    """
    Writes beside the outputs of a stage that is about to end what [`write_companions`] writes.

    Args:
        run ([`StageRun`]): The run.
        links (`dict[str, str]`, *optional*): Related repositories by kind.
    """
    run.details["links"] = links or {}
    write_companions(run.staging, run.draft_record())


def write_companions(directory: str | os.PathLike, record: StageRecord) -> dict[str, str]:
    """
    Writes card, results and `companions.json` beside a stage's outputs. That list says what a repository holds: the
    weights by their digest, and all other files that the stage wrote; see
    [`~modeling_mmesid.checkpoints.add_companions`]. A card that was edited by hand stays as it is.

    Args:
        directory (`str` or `os.PathLike`): The directory of the outputs.
        record ([`StageRecord`]): The record of the stage, with the digests of the outputs.

    Returns:
        `dict[str, str]`: SHA-256 of the written files by name.
    """
    directory = Path(directory)
    written = []
    if not is_card_edited(directory, record):
        written.append(save_card(directory, dataclasses.asdict(record)).name)
    if record.metrics:
        write_text_atomic(directory / RESULTS_NAME, results_text(record.metrics))
        written.append(RESULTS_NAME)
    weights = {name: digest for name, digest in record.outputs.items() if re.fullmatch(r"[^/]+\.safetensors", name)}
    others = sorted({*record.outputs, *written} - {*weights, COMPANIONS_NAME})
    files = {name: REPOSITORY if name == CARD_NAME else None for name in others}
    write_text_atomic(directory / COMPANIONS_NAME, _json({"weights": weights, "files": files}))
    return {name: file_digest(directory / name) for name in [*written, COMPANIONS_NAME]}


def is_card_edited(directory: Path, record: StageRecord) -> bool:
    """Whether somebody changed the card since it was written from the record."""
    card, digest = directory / CARD_NAME, record.outputs.get(CARD_NAME)
    return digest is not None and card.is_file() and file_digest(card) != digest


def add_metrics(directory: str | os.PathLike, metrics: dict) -> None:
    """Adds later measurements to the record, the card and the results of a stage's directory."""
    directory = Path(directory)
    record = StageRecord.load(directory)
    record.metrics |= metrics
    save_record(directory, record)


def save_record(directory: Path, record: StageRecord) -> None:
    """Writes the record with what [`write_companions`] makes of it."""
    record.outputs |= write_companions(directory, record)
    write_text_atomic(directory / RECORD_NAME, _json(dataclasses.asdict(record)))


def results_text(metrics: dict) -> str:
    """The metrics of a stage as the text of `eval_results.json`; JSON knows no NaN, which becomes null."""
    return _json(json.loads(json.dumps(metrics), parse_constant=lambda constant: None))


def publication(
    directory: str | os.PathLike, repo_id: str, links: dict[str, str] | None = None
) -> tuple[str, dict[str, Path | bytes]]:
    """
    What of a stage's directory goes to the Hub: the files that `companions.json` lists, with the repository's name on
    the card. The record stays behind.

    Args:
        directory (`str` or `os.PathLike`): The directory of a stage that has finished.
        repo_id (`str`): The repository, owner/name.
        links (`dict[str, str]`, *optional*): Related repositories by kind, in place of those on the card.

    Returns:
        `tuple[str, dict[str, Path | bytes]]`: The type of the repository (`"model"` or `"dataset"`), and path or
        content of every file by its name in the repository.

    Raises:
        FileNotFoundError: If no stage wrote the directory, or a file that it wrote is gone.
        ValueError: If the result of the stage is not published, a link is none, the card was edited and cannot be
            given links, or a file holds what is private.
    """
    directory = Path(directory)
    if not (directory / RECORD_NAME).is_file():
        raise FileNotFoundError(
            f"'{directory}' has no {RECORD_NAME}; give the directory of a stage that has finished."
        )
    record = StageRecord.load(directory)
    if record.stage not in SUBJECTS:
        raise ValueError(
            f"'{directory}' was written by the stage '{record.stage}'; what goes to the Hub comes from "
            f"{', '.join(SUBJECTS)}."
        )
    for name in [*record.outputs, COMPANIONS_NAME]:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"'{directory / name}' is gone; run `mmesid {record.stage}` again.")
    listed = json.loads((directory / COMPANIONS_NAME).read_text(encoding="utf-8"))
    files: dict[str, Path | bytes] = {name: directory / name for name in [*listed["weights"], *listed["files"]]}
    card = (directory / CARD_NAME).read_text(encoding="utf-8")
    if links:
        if is_card_edited(directory, record):
            raise ValueError(f"'{directory / CARD_NAME}' was edited by hand; write the links there instead.")
        record.details["links"] = links
        card = render_card(dataclasses.asdict(record))
    files[CARD_NAME] = card.replace(REPOSITORY, repo_id).encode()
    check_private(directory, files)
    return SUBJECTS[record.stage].repo_type, dict(sorted(files.items()))


def check_private(directory: Path, files: dict[str, Path | bytes]) -> None:
    """
    Raises:
        ValueError: If a file holds the token, or the path of a directory of this machine.
    """
    if "config.json" in files:
        config = json.loads((directory / "config.json").read_bytes())
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
    turns up by chance among the bytes of large weights, and counts only with a slash behind it."""
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


def _json(value) -> str:
    return json.dumps(value, indent=2) + "\n"


def push(
    directory: str | os.PathLike, repo_id: str, *, links: dict[str, str] | None = None, **upload_arguments
) -> CommitInfo:
    """
    Publishes the directory of a stage on the Hub: the files that the stage wrote, without checkpoints of the training.

    ```python
    >>> mmesid.push("runs/quickstart/recommender", "me/recommender", links={"dataset": "me/dataset"}, private=True)
    ```

    Args:
        directory (`str` or `os.PathLike`): The directory of a stage that has finished.
        repo_id (`str`): The repository, owner/name.
        links (`dict[str, str]`, *optional*): Related repositories that the card links to, by kind (`"dataset"`,
            `"sasrec"`, `"encoder"`, `"quantizer"`, `"recommender"`); by default those that the stage was given.
        **upload_arguments: `private`, `revision`, `create_pr`, `commit_message` and `token` of [`upload`].

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        FileNotFoundError: If no stage wrote the directory, or a file that it wrote is gone.
        ValueError: If the directory cannot be published as it is, or the Hub does not take it.
    """
    repo_type, files = publication(directory, repo_id, links)
    return upload(files, repo_id, repo_type, **upload_arguments)


def upload(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with mmesid",
    token: str | None = None,
) -> CommitInfo:
    """
    Creates the repository and the branch where they are missing and sends the files in one commit. Large files that an
    earlier call sent before it broke off, and files that have not changed, are not sent again.

    Args:
        files (`dict[str, Path | bytes]`): Path or content of every file by its name in the repository.
        repo_id (`str`): The repository, owner/name.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): Whether a new repository is private; by default as the account is set up.
        revision (`str`, *optional*): The branch; `main` by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of changing the branch.
        commit_message (`str`, *optional*, defaults to `"Upload with mmesid"`): Message of the commit.
        token (`str`, *optional*): A token that may write; by default that of `hf auth login` or HF_TOKEN.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError: If the Hub cannot be reached or does not take the files.
    """
    api = HfApi(token=token)
    try:
        # A pull request needs no right to write, which creating the repository would ask for.
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
    except HfHubHTTPError as error:
        raise ValueError(_explanation(error, repo_id)) from error
    except httpx2.TransportError as error:
        raise ValueError(
            f"The Hub at {constants.ENDPOINT} cannot be reached ({error}); look at the network or the variable "
            f"HF_ENDPOINT, and push to '{repo_id}' again: what arrived is not sent again."
        ) from error
    except RuntimeError as error:
        # What huggingface_hub makes of a large file that could not be sent.
        raise ValueError(
            f"{error} Push to '{repo_id}' again: what arrived is not sent again. ({error.__cause__})"
        ) from error


def _explanation(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The Hub does not let you write to '{repo_id}' ({status}); log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there."
        )
    return f"The Hub answered {status} when '{repo_id}' was pushed: {error.server_message or error}."

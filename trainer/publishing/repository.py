"""What of a stage's directory a repository on the Hub holds, decided once: for `mmesid push`, for the trainers, and,
through the list of companions, for the models' own `push_to_hub`."""

import dataclasses
import json
import mmap
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from mmesid.hub_cards import (
    CARD_NAME,
    EVAL_RESULTS_NAME,
    REPOSITORY,
    eval_results,
    render_card,
    save_card,
    subject_of,
)
from modeling_mmesid.checkpoints import COMPANIONS_NAME, file_digest, read_companions, require_public_base_model

from ..running.locks import DirectoryLock
from ..running.records import (
    LOGS_DIR,
    RECORD_NAME,
    RESULTS_NAME,
    StageRecord,
    StageRun,
    lock_name,
    require_exists,
    to_json,
    write_text_atomic,
)
from ..running.training_log import describe_training, keep_logs


if TYPE_CHECKING:
    from .hub_trainer import HubTrainerMixin


def present(run: StageRun, trainer: "HubTrainerMixin | None" = None) -> None:
    """Writes beside the outputs of a stage that is about to end the log, curves and trackers' files of its training,
    if it trained, and what [`write_companions`] writes."""
    run.details["links"] = {}
    if trainer is not None:
        run.details["links"] = trainer.hub_links or {}
        run.details["architecture"] = trainer.architecture()
        run.details.update(describe_training(trainer, run.staging, trainer.evaluated_on()))
        keep_logs(run.checkpoints_dir, run.staging)
    write_companions(run.staging, run.draft_record())


def write_companions(directory: Path, record: StageRecord) -> dict[str, str]:
    """
    Writes card, results and `companions.json` beside a stage's outputs and returns their digests by name. That list
    says what a repository holds: the weights by their digest, and all other files that the stage wrote; see
    [`~modeling_mmesid.checkpoints.add_companions`]. A card that was edited by hand stays as it is.
    """
    written = []
    if not is_card_edited(directory, record):
        written.append(save_card(directory, dataclasses.asdict(record)).name)
    if record.metrics:
        write_text_atomic(directory / RESULTS_NAME, to_json(record.metrics))
        written.append(RESULTS_NAME)
    if (figures := eval_results(dataclasses.asdict(record))) is not None:
        (directory / EVAL_RESULTS_NAME).parent.mkdir(exist_ok=True)
        write_text_atomic(directory / EVAL_RESULTS_NAME, figures)
        written.append(EVAL_RESULTS_NAME)
    weights = {name: digest for name, digest in record.outputs.items() if re.fullmatch(r"[^/]+\.safetensors", name)}
    shown = {name for name in record.outputs if not name.startswith(f"{LOGS_DIR}/")}
    others = sorted({*shown, *written} - {*weights, COMPANIONS_NAME})
    files = {name: REPOSITORY if name == CARD_NAME else None for name in others}
    write_text_atomic(directory / COMPANIONS_NAME, to_json({"weights": weights, "files": files}))
    return {name: file_digest(directory / name) for name in [*written, COMPANIONS_NAME]}


def is_card_edited(directory: Path, record: StageRecord) -> bool:
    """Whether somebody changed the card since it was written from the record."""
    card, digest = directory / CARD_NAME, record.outputs.get(CARD_NAME)
    if digest is None or not card.is_file() or file_digest(card) == digest:
        return False
    # Killed between the two, a run leaves the new card beside the old record.
    return card.read_text(encoding="utf-8") != render_card(dataclasses.asdict(record))


def add_metrics(
    directory: str | os.PathLike,
    metrics: dict,
    models: dict[str, dict] | None = None,
    measured_at: str | None = None,
) -> None:
    """Adds later measurements to the record, the card and the results of a stage's directory, where these do not have
    them yet; `models` are those of all models that were measured together, by the name of their directory, and
    `measured_at` is when that was, in ISO 8601."""
    directory = Path(directory)
    lock = DirectoryLock(directory / lock_name(RECORD_NAME), wait=60)
    names = ("test", "test_confidence")
    compared = {model: {name: one[name] for name in names} for model, one in (models or {}).items()}
    details: dict = {"comparison": {"this": directory.name, "models": compared}} if models else {}
    details |= {} if measured_at is None else {"measured_at": measured_at}
    known = StageRecord.load(directory)
    is_known = known.metrics | metrics == known.metrics and known.details | details == known.details
    if is_known and not lock.path.exists():
        return
    with lock:
        record = StageRecord.load(directory)
        record.metrics |= metrics
        record.details |= details
        save_record(directory, record)


def save_record(directory: Path, record: StageRecord) -> None:
    """Writes the record with what [`write_companions`] makes of it."""
    record.outputs |= write_companions(directory, record)
    write_text_atomic(directory / RECORD_NAME, to_json(dataclasses.asdict(record)))


def publication(
    directory: str | os.PathLike, repo_id: str, links: dict[str, str] | None = None
) -> tuple[str, dict[str, Path | bytes]]:
    """
    The type of the repository (`"model"` or `"dataset"`), and path or content of every file that goes there by its
    name: what `companions.json` lists, with the repository's name, and `links` in place of its own, on the card. The
    record stays behind.
    """
    directory = Path(directory)
    require_exists(directory / RECORD_NAME)
    record = StageRecord.load(directory)
    subject = subject_of(record.stage)
    for name in [*record.outputs, COMPANIONS_NAME]:
        require_exists(directory / name)
    listed = read_companions(directory / COMPANIONS_NAME)
    files: dict[str, Path | bytes] = {name: directory / name for name in [*listed["weights"], *listed["files"]]}
    card = (directory / CARD_NAME).read_text(encoding="utf-8")
    if links:
        if is_card_edited(directory, record):
            raise ValueError(f"'{directory / CARD_NAME}' was edited by hand; write the links there instead.")
        record.details["links"] = links
        card = render_card(dataclasses.asdict(record))
    files[CARD_NAME] = card.replace(REPOSITORY, repo_id).encode()
    if (results := eval_results(dataclasses.asdict(record))) is not None:
        files[EVAL_RESULTS_NAME] = results.encode()
    check_private(directory, files)
    return subject.repo_type, dict(sorted(files.items()))


def check_private(directory: Path, files: dict[str, Path | bytes]) -> None:
    """Refuses files of which one holds the token, or the path of a directory of this machine."""
    if "config.json" in files:
        config = json.loads((directory / "config.json").read_bytes())
        require_public_base_model(config.get("base_model_name_or_path"))
    paths = {str(path) for path in (Path.home(), Path.cwd(), directory.resolve()) if len(path.parts) > 1}
    # Alone or with more behind it, but not as the beginning of a longer name. A short one, such as `/root`, turns up
    # by chance among the bytes of large weights, and counts only with a slash behind it.
    patterns = [re.escape(path.encode()) + (rb"(?![\w-])" if len(path) > 5 else b"/") for path in sorted(paths)]
    private = {"a directory of this machine": re.compile(b"|".join(patterns))}
    if (token := get_token()) is not None:
        private["your token for the Hub"] = re.compile(re.escape(token.encode()))
    for name, content in files.items():
        for what, pattern in private.items():
            if _holds(content, pattern):
                raise ValueError(f"'{name}' of '{directory}' holds {what}; take it out before others read it.")


def _holds(content: Path | bytes, pattern: re.Pattern[bytes]) -> bool:
    if isinstance(content, bytes):
        return pattern.search(content) is not None
    if content.stat().st_size == 0:
        return False
    with open(content, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return pattern.search(mapped) is not None


def push(
    directory: str | os.PathLike, repo_id: str, *, links: dict[str, str] | None = None, **upload_arguments
) -> CommitInfo:
    """
    Publishes the directory of a stage on the Hub: the files that the stage wrote, without checkpoints of the training.
    Large files that an earlier call sent before it broke off, and files that have not changed, are not sent again.

    ```python
    >>> mmesid.push("runs/quickstart/recommender", "me/recommender", links={"dataset": "me/dataset"}, private=True)
    ```

    Args:
        directory (`str` or `os.PathLike`): The directory of a stage that has finished.
        repo_id (`str`): The repository, owner/name; created if it does not exist.
        links (`dict[str, str]`, *optional*): Related repositories that the card links to, by kind (`"dataset"`,
            `"sasrec"`, `"encoder"`, `"quantizer"`, `"recommender"`); by default those that the stage was given.
        private (`bool`, *optional*): Whether a new repository is private; by default as the account is set up.
        revision (`str`, *optional*): The branch, created if it does not exist; `main` by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of changing the branch.
        commit_message (`str`, *optional*, defaults to `"Upload with mmesid"`): Message of the commit.
        token (`str`, *optional*): A token that may write; by default that of `hf auth login` or HF_TOKEN.

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
    """Creates the repository and the branch where they are missing and sends the files in one commit; see [`push`]."""
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
    # RuntimeError is what huggingface_hub makes of a large file that could not be sent.
    except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
        raise ValueError(_explanation(error, repo_id)) from error


def _explanation(error: Exception, repo_id: str) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The files for '{repo_id}' did not reach the Hub at {constants.ENDPOINT} ({error.__cause__ or error}); "
            "look at the network or the variable HF_ENDPOINT, and push again: what arrived is not sent again."
        )
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The Hub does not let you write to '{repo_id}' ({status}); log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there."
        )
    return f"The Hub answered {status} when '{repo_id}' was pushed: {error.server_message or error}."

"""
Publishes the directory of a stage on the Hub: exactly the files that the stage wrote, no checkpoints of the training.

    mmesid push --directory runs/quickstart/recommender --repo_id me/my-recommender --private true

The token comes from `hf auth login` or from the variable HF_TOKEN.
"""

import glob
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..arguments import PushArguments, parse
from ..records import RECORD_NAME, StageRecord


# What the directory of each stage is on the Hub.
REPO_TYPES = {"prepare": "dataset", "sasrec": "model", "quantize": "model", "finetune": "model"}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PushArguments, argv)
    if not PartialState().is_main_process:
        return
    directory = Path(arguments.directory)
    repo_type, files = published_files(directory)
    for name in files:
        print(f"{(directory / name).stat().st_size:>14,} {name}")
    if arguments.dry_run:
        print(f"push: would send {len(files)} files to the {repo_type} repository '{arguments.repo_id}'")
        return
    try:
        url = push(directory, files, repo_type, arguments)
    except HfHubHTTPError as error:
        raise ValueError(_explanation(error, arguments.repo_id)) from error
    print(f"push: wrote {url}")


def published_files(directory: Path) -> tuple[str, list[str]]:
    """
    What of a stage's directory goes to the Hub.

    The stage's record stays behind: it holds the builder's paths, and the card says what readers need of it.

    Returns:
        `tuple[str, list[str]]`: The type of the repository (`"model"` or `"dataset"`) and the files, relative to
            `directory`.

    Raises:
        FileNotFoundError: If no stage wrote the directory, or a file that it wrote is gone.
        ValueError: If the stage is none whose result is published.
    """
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
    return REPO_TYPES[record.stage], sorted(record.outputs)


def push(directory: Path, files: list[str], repo_type: str, arguments: PushArguments) -> str:
    """Makes repository and branch where they are missing, sends the files in one commit, returns its address."""
    api = HfApi()
    api.create_repo(arguments.repo_id, repo_type=repo_type, private=arguments.private, exist_ok=True)
    if arguments.revision is not None:
        api.create_branch(arguments.repo_id, branch=arguments.revision, repo_type=repo_type, exist_ok=True)
    commit = api.upload_folder(
        repo_id=arguments.repo_id,
        repo_type=repo_type,
        folder_path=directory,
        allow_patterns=[glob.escape(name) for name in files],
        revision=arguments.revision,
        commit_message=arguments.commit_message or f"Upload {directory.name} with mmesid",
    )
    return commit.commit_url


def _explanation(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The Hub does not let you write to '{repo_id}' ({status}); log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there."
        )
    return f"The Hub answered {status} when '{repo_id}' was pushed: {error.server_message or error}."


if __name__ == "__main__":
    main()

"""
Publishes the directory of a stage on the Hub: the files that the stage wrote, without checkpoints of the training.

    mmesid push --directory runs/quickstart/recommender --repo_id me/my-recommender --private true \
        --links dataset=me/my-dataset quantizer=me/my-quantizer sasrec=me/my-sasrec

The token comes from `hf auth login` or from the variable HF_TOKEN. A push that broke off is repeated: what arrived is
not sent again. `--preview_dir` writes the card and its pictures as the repository would show them.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from mmesid.hub_cards import CARD_NAME

from ..publishing.repository import publication, upload
from ..running.arguments import CommandArguments, parse, parse_links
from ..running.errors import run_as_script


@dataclass(kw_only=True)
class PushArguments(CommandArguments):
    """
    Publish what a stage wrote as one repository on the Hub.

    Args:
        > Repository

        directory (`str`): Directory that prepare, sasrec, encoder, quantize or finetune wrote.
        repo_id (`str`): Repository on the Hub, owner/name; created if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; by default as the account is set up.
        revision (`str`, *optional*): Branch to push to, created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request with the files instead of changing the
            branch.
        commit_message (`str`, *optional*): Message of the commit.
        links (`list[str]`, *optional*): Related repositories that the card links to, kind=owner/name each; kinds are
            dataset, sasrec, encoder, quantizer and recommender.

        > Trial

        dry_run (`bool`, *optional*, defaults to `False`): List the files and stop before anything is sent.
        preview_dir (`str`, *optional*): Also write the card and its pictures to this directory, as they will be sent.
    """

    directory: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    links: list[str] | None = None
    dry_run: bool = False
    preview_dir: str | None = None


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PushArguments, argv)
    links = parse_links(arguments.links)
    if not PartialState().is_main_process:
        return
    directory = Path(arguments.directory)
    repo_type, files = publication(directory, arguments.repo_id, links)
    for name, content in files.items():
        print(f"{len(content) if isinstance(content, bytes) else content.stat().st_size:>14,} {name}")
    if arguments.preview_dir is not None:
        write_preview(Path(arguments.preview_dir), files)
    if arguments.dry_run:
        print(f"push: would send {len(files)} files to the {repo_type} repository '{arguments.repo_id}'")
        return
    commit = upload(
        files,
        arguments.repo_id,
        repo_type,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        commit_message=arguments.commit_message or f"Upload {directory.name} with mmesid",
    )
    print(f"push: wrote {commit.pr_url or commit.commit_url}")


def write_preview(directory: Path, files: dict[str, Path | bytes]) -> None:
    """Writes the card and the pictures that it shows."""
    for name, content in files.items():
        if name == CARD_NAME or name.startswith("figures/"):
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


if __name__ == "__main__":
    run_as_script("push", main)

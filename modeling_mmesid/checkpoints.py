"""What a checkpoint of this project is: a configuration of a format that this code reads, weights in safetensors, and
what lies beside them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging


logger = logging.get_logger(__name__)

# Raised when older code can no longer read what newer code writes; never when something optional is added.
FORMAT_VERSION = 1

# What a stage writes beside its outputs, with their SHA-256 and what was measured.
RECORD_NAME = "record.json"
CARD_NAME = "README.md"
RESULTS_NAME = "eval_results.json"
# What a card calls its repository until it is known.
UNKNOWN_REPOSITORY = "this/repository"

# Kinds of repositories that a card can link to, and what they are to a reader.
LINKS = {
    "dataset": "the prepared dataset",
    "sasrec": "SASRec, the collaborative modality and a baseline",
    "encoder": "the encoder of texts and pictures",
    "quantizer": "the quantizer that made the semantic IDs",
    "recommender": "the recommender",
}

# Arguments of `from_pretrained` that say where a file comes from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@strict
class CheckpointConfig(PreTrainedConfig):
    r"""
    What the configurations of this project share.

    Args:
        format_version (`int`, *optional*, defaults to `1`):
            Major version of the checkpoint's format. Checkpoints from before it was written have the first.
    """

    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As [`~transformers.PreTrainedConfig.from_dict`].

        Raises:
            ValueError: If the checkpoint was written in a newer format than this code reads.
        """
        # Before the settings are looked at, which may mean something else there.
        version = config_dict.get("format_version", 1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format {version}, and the mmesid installed here reads formats up to "
                f"{FORMAT_VERSION}; upgrade mmesid."
            )
        return super().from_dict(config_dict, **kwargs)


def require_safetensors(name_or_path: str | os.PathLike, **hub_arguments) -> None:
    """
    Raises:
        OSError: If a checkpoint, on disk or on the Hub, holds no weights in safetensors.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_arguments) is not None:
            return
    raise OSError(
        f"'{name_or_path}' holds no {SAFE_WEIGHTS_NAME}, and weights in pickle files are not read, for they can run "
        "any code; have its owner save it again with `save_pretrained`."
    )


def weight_files(name_or_path: str | os.PathLike, **hub_arguments) -> list[str]:
    """
    The files, on this machine, with the weights of a checkpoint: one, or the shards of a large one.

    Raises:
        OSError: If the checkpoint, on disk or on the Hub, holds no weights in safetensors.
    """
    require_safetensors(name_or_path, **hub_arguments)
    whole = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if whole is not None:
        return [whole]
    index = Path(cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub_arguments))
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [cached_file(name_or_path, shard, **hub_arguments) for shard in shards]


def weight_names(name_or_path: str | os.PathLike, **hub_arguments) -> set[str]:
    """Names of the tensors in [`weight_files`]."""
    names = set()
    for path in weight_files(name_or_path, **hub_arguments):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def require_public_base_model(name_or_path: str | None) -> None:
    """
    Raises:
        ValueError: If what is about to be published names its base model by a folder on this machine.
    """
    if name_or_path is not None and os.path.exists(name_or_path):
        raise ValueError(
            f"The checkpoint names its base model by the folder '{name_or_path}', which nobody else has; train on a "
            "base model from the Hub, or save it with `merge_backbone=True`."
        )


def file_digest(path: str | os.PathLike, on_read: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file; `on_read` is told how many bytes have been read since the last call."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            if on_read is not None:
                on_read(len(block))
    return digest.hexdigest()


def results_text(metrics: dict) -> str:
    """What `eval_results.json` says of a stage's metrics; of one that is no number, null, for JSON knows no NaN."""
    return json.dumps(json.loads(json.dumps(metrics), parse_constant=lambda constant: None), indent=2) + "\n"


def related_repositories(links: dict[str, str], repo_id: str) -> str:
    """
    The section of a card that links to related repositories; empty if there are none but the card's own.

    Args:
        links (`dict[str, str]`): Names of repositories by kind, a key of `LINKS`.
        repo_id (`str`): The card's own repository, which one list of links for a whole family may hold.

    Raises:
        ValueError: If there is no such kind of link.
    """
    for kind in links:
        if kind not in LINKS:
            raise ValueError(f"A card has no link to a '{kind}'; the kinds are {', '.join(LINKS)}.")
    lines = [
        f"- [{name}](https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}): {LINKS[kind]}"
        for kind, name in links.items()
        if name != repo_id
    ]
    return "\n".join(["## Related repositories", "", *lines, ""]) if lines else ""


def link_card(text: str, links: dict[str, str], repo_id: str) -> str:
    """A model's card as [`related_repositories`] and the metadata for a dataset on the Hub make it."""
    card = ModelCard(text)
    before, licence, after = card.text.partition("## Licence\n")
    card.text = "\n".join([before.rstrip(), "", related_repositories(links, repo_id), licence + after])
    if "dataset" in links:
        card.data.datasets = [links["dataset"]]
        for result in card.data.eval_results or []:
            result.dataset_type = links["dataset"]
    return str(card)


def add_accompanying_files(
    directory: str | os.PathLike, source: str | os.PathLike, repo_id: str, links: dict[str, str] | None = None
) -> None:
    """
    Adds to a saved model what the directory of the stage that trained it holds besides: processor, semantic IDs,
    pictures, the card with the repository's name in its code, and the results as `eval_results.json`.

    Nothing is added, with a warning, if the weights are no longer those of the stage: its results are not theirs.

    Args:
        directory (`str` or `os.PathLike`): Where the model was saved; what it holds stays, but for the card.
        source (`str` or `os.PathLike`): The directory of the stage.
        repo_id (`str`): The repository that the directory is published as.
        links (`dict[str, str]`, *optional*): Related repositories by kind, a key of `LINKS`, that the card links to,
            unless it was edited by hand.
    """
    directory, source = Path(directory), Path(source)
    record = json.loads((source / RECORD_NAME).read_text(encoding="utf-8"))
    for path in directory.glob("*.safetensors"):
        if record["outputs"].get(path.name) != file_digest(path):
            logger.warning(
                "The weights are no longer those of '%s', so its processor, card and results are not published with "
                "them; push the processor to '%s' as well.",
                source,
                repo_id,
            )
            return
    for name in record["outputs"]:
        target = directory / name
        if name == CARD_NAME or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
    card = (source / CARD_NAME).read_text(encoding="utf-8").replace(UNKNOWN_REPOSITORY, repo_id)
    if links and file_digest(source / CARD_NAME) == record["outputs"][CARD_NAME]:
        card = link_card(card, links, repo_id)
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    if record["metrics"]:
        (directory / RESULTS_NAME).write_text(results_text(record["metrics"]), encoding="utf-8")


def require_fit(name_or_path: str | os.PathLike, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """
    Raises:
        ValueError: If a checkpoint lacks weights of its model (`missing`) or holds others (`unexpected`).
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint '{name_or_path}' does not fit its configuration (missing: {missing or 'nothing'}, "
            f"unexpected: {unexpected or 'nothing'}); download or save it again."
        )


class SafetensorsMixin:
    """
    For models that load from safetensors alone. One that was loaded from the directory of a stage is pushed to the Hub
    with all that the stage left there, as long as its weights are what they were; any other by itself, as
    [`~transformers.PreTrainedModel.push_to_hub`] does.

    Attributes:
        hub_links (`dict[str, str]`, *optional*): Related repositories that its card on the Hub links to.
    """

    hub_links: dict[str, str] | None = None

    def push_to_hub(self, repo_id: str, *, links: dict[str, str] | None = None, **kwargs) -> str:
        """
        As [`~transformers.PreTrainedModel.push_to_hub`], with what the stage left.

        Args:
            repo_id (`str`): The repository, owner/name.
            links (`dict[str, str]`, *optional*): Related repositories that this card of a stage and later ones link
                to, by kind, a key of `LINKS`: `{"dataset": "me/my-dataset"}`. Defaults to `hub_links`.
            **kwargs: Further arguments of [`~transformers.PreTrainedModel.push_to_hub`].
        """
        if links is not None:
            self.hub_links = links
        return super().push_to_hub(repo_id, **kwargs)

    def prepare_upload(self, directory: str | os.PathLike, repo_id: str) -> None:
        """Completes a directory with the saved model that is about to be published as `repo_id`."""
        source = self.name_or_path
        if source and os.path.isfile(os.path.join(source, RECORD_NAME)) and not os.path.samefile(source, directory):
            add_accompanying_files(directory, source, repo_id, self.hub_links)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Through here go `push_to_hub` and `save_pretrained(push_to_hub=True)`.
        self.prepare_upload(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            OSError: If the checkpoint holds no weights in safetensors.
            ValueError: If a weight is missing from the checkpoint, or the checkpoint holds one that the model does not
                have.
        """
        require_safetensors(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        )
        with_loading_info = kwargs.pop("output_loading_info", False)
        model, loading = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            **kwargs | {"use_safetensors": True, "output_loading_info": True},
        )
        # The library would draw a missing weight at random, and say so in a table that nobody reads.
        require_fit(pretrained_model_name_or_path, loading["missing_keys"], loading["unexpected_keys"])
        return (model, loading) if with_loading_info else model

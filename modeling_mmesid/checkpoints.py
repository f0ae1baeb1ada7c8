"""What a checkpoint of this project is: a configuration of a format that this code reads, weights in safetensors, and
the files that belong to these weights."""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from logging import ERROR, getLogger
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging


logger = logging.get_logger(__name__)
# Imported with PEFT where it is installed, it would tell everybody the lack of a kernel for 4-bit products.
getLogger("bitsandbytes.backends.cpu").setLevel(ERROR)

# Raised when older code can no longer read what newer code writes; never when something optional is added.
FORMAT_VERSION = 1

# What a configuration may hold: beyond, a model would be built for hours or fill the memory before its weights tell
# that they are others.
MOST_CONFIG_BYTES = 2**24
MOST_NESTED = 20
LARGEST_SIZE = 2**31
MOST_LAYERS = 4096

# Lists the files of a directory that belong to its weights, see `add_companions`.
COMPANIONS_NAME = "companions.json"

# Weights that are read in a second or two, at most.
SLOW_BYTES = 2**30

# Arguments of `from_pretrained` that say where a file comes from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Arguments of `save_pretrained(push_to_hub=True)` that say where a checkpoint goes.
PUSH_ARGUMENTS = (
    "repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description", "tags"
)  # fmt: skip


@strict
class CheckpointConfig(PreTrainedConfig):
    r"""
    What the configurations of this project share.

    Args:
        format_version (`int`, *optional*, defaults to `1`):
            Major version of the checkpoint's format.
    """

    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As [`~transformers.PreTrainedConfig.from_dict`]; refuses a newer format than this code reads."""
        # Before the settings are looked at, which may mean something else there.
        version = config_dict.get("format_version", 1)
        if not isinstance(version, int):
            raise ValueError(f"The format_version of this checkpoint is {version!r:.100}; download or save it again.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format {version}, and the mmesid installed here reads formats up to "
                f"{FORMAT_VERSION}; upgrade mmesid."
            )
        require_sizes(config_dict)
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r:.100}, which is none of torch's; get the checkpoint again.")
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"This is the configuration of a {model_type!r:.100}, not of a {cls.model_type}.")
        with told_of_damage(f"This configuration of a {cls.model_type}"):
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As [`~transformers.PreTrainedConfig.from_pretrained`]; raises a `ValueError` that names the checkpoint if
        its configuration is damaged."""
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        read_config(pretrained_model_name_or_path, **hub_arguments)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            raise ValueError(f"'{pretrained_model_name_or_path}': {error}") from error

    def require(self, fits: Callable[[Any], bool], wanted: str, *names: str) -> None:
        """Raises a `ValueError` that names the first of these settings whose value (of a list: one of its values) does
        not fit."""
        for name in names:
            value = getattr(self, name)
            if not all(map(fits, value if isinstance(value, (list, tuple)) else [value])):
                raise ValueError(f"{name} is {value}; it must be {wanted}.")


@contextmanager
def bar_if_slow(size: int) -> Iterator[None]:
    """Loads or saves so many bytes without the library's bar, unless it takes long enough to be looked at."""
    shown = logging.is_progress_bar_enabled()
    if shown and size < SLOW_BYTES:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_config(name_or_path: str | os.PathLike, **hub_arguments) -> dict:
    """The configuration of a checkpoint as its file has it; raises an `OSError` if there is none, and a `ValueError`
    if it is too large, too deep or no JSON object."""
    file = Path(cached_file(name_or_path, CONFIG_NAME, **hub_arguments))
    with told_of_damage(f"The configuration '{file}'"):
        if file.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError(f"it has more than {MOST_CONFIG_BYTES:,} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
        require_sizes(config)
    return config


def require_sizes(value, name: str = "", depth: int = 0) -> None:
    """Raises a `ValueError` if a number in nested settings is beyond all models, or they are nested too deeply."""
    if depth > MOST_NESTED:
        raise ValueError(f"Settings are nested more than {MOST_NESTED} levels deep; get the checkpoint again.")
    if isinstance(value, dict):
        for key, member in value.items():
            require_sizes(member, key, depth + 1)
    elif isinstance(value, list):
        for member in value:
            require_sizes(member, name, depth + 1)
    elif isinstance(value, (int, float)):
        largest = MOST_LAYERS if re.search(r"layers?$|quantizers$", name) else LARGEST_SIZE
        # NaN is not.
        if not abs(value) <= largest:
            raise ValueError(f"{name} is {value:.6g}, and no model has more than {largest:,}; get it again.")


@contextmanager
def told_of_damage(what: str) -> Iterator[None]:
    """Makes a `ValueError` with a sentence of what the libraries raise that read a damaged file."""
    try:
        yield
    except (
        StrictDataclassError, AttributeError, KeyError, IndexError, OverflowError, RuntimeError, SafetensorError,
        TypeError, ValueError, re.error, struct.error,
    ) as error:  # fmt: skip
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        # A library may quote a whole value.
        said = " ".join(str(cause).split())[:500].rstrip(".")
        raise ValueError(f"{what} is damaged or of another model ({said}); download or save it again.") from error


def weight_files(name_or_path: str | os.PathLike, **hub_arguments) -> list[str]:
    """The files, on this machine, with the weights of a checkpoint: one file, or the shards of a large checkpoint."""
    whole, index = (
        cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if whole is not None:
        return [whole]
    if index is None:
        raise OSError(
            f"'{name_or_path}' holds no {SAFE_WEIGHTS_NAME}, and weights in pickle files are not read, for they can "
            "run any code; have its owner save it again with `save_pretrained`."
        )
    with told_of_damage(f"The list of weights '{index}'"):
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    require_inside(index, shards)
    return [cached_file(name_or_path, shard, **hub_arguments) for shard in shards]


def weights_digest(files: Iterable[str]) -> str:
    """SHA-256 over the digests of these files, each read once as long as its size and time stay the same: a base model
    has gigabytes, and several checkpoints may name it."""
    stats = ((file, os.stat(file)) for file in files)
    digests = (_digest_of(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache
def _digest_of(path: str, size: int, time: int) -> str:
    return file_digest(path)


def require_room(name_or_path: str | os.PathLike, build: Callable[[], nn.Module], files: list[str], part: str) -> None:
    """Refuses a checkpoint whose configuration asks for far more numbers than its weights hold (which may be packed or
    tied), before they fill the memory: `build` makes the model, and `part` is in the names of its weights."""
    held = 0
    for path in files:
        with told_of_damage(f"The file of weights '{path}'"), safe_open(path, "pt") as weights:
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys() if part in name)
    with told_of_damage(f"The configuration of '{name_or_path}'"), torch.device("meta"):
        asked = sum(tensor.numel() for tensor in build().state_dict().values())
    if asked > 16 * held + 2**20:
        raise ValueError(
            f"The configuration of '{name_or_path}' asks for {asked:,} numbers and its weights hold {held:,}; "
            "download or save it again."
        )


def require_inside(listing: str | os.PathLike, names: Iterable[str]) -> None:
    """Refuses a list of files of which one does not lie in the folder of the list."""
    for name in names:
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            if path.anchor or ".." in path.parts:
                raise ValueError(
                    f"'{listing}' names '{name}', which lies outside its folder; get the checkpoint from somebody "
                    "you trust."
                )


def require_fit(name_or_path: str | os.PathLike, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuses a checkpoint that lacks weights of its model (`missing`) or holds others (`unexpected`)."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint '{name_or_path}' does not fit its configuration (missing: {missing or 'nothing'}, "
            f"unexpected: {unexpected or 'nothing'}); download or save it again."
        )


def require_public_base_model(name_or_path: str | None) -> None:
    """Refuses to publish what names its base model by a folder on this machine."""
    if name_or_path is not None and os.path.exists(name_or_path):
        raise ValueError(
            f"The checkpoint names its base model by the folder '{name_or_path}', which nobody else has; train on a "
            "base model from the Hub, or save it with `merge_backbone=True`."
        )


def add_companions(directory: str | os.PathLike, source: str, repo_id: str) -> None:
    """
    Adds to a saved checkpoint, before it is published, the files that belong to its weights in the directory `source`
    of the model; with a warning, none if the weights are no longer the same. `companions.json` lists them there:
    `{"weights": {name: SHA-256}, "files": {name: placeholder}}`. A placeholder is the text of the file that stands for
    the name of the repository, `null` where there is none.
    """
    listing = Path(source, COMPANIONS_NAME)
    if not source or not listing.is_file():
        return
    companions = read_companions(listing)
    if {path.name: file_digest(path) for path in Path(directory).glob("*.safetensors")} != companions["weights"]:
        logger.warning(
            f"The weights are no longer those of '{source}', so the files that belong to these are not published "
            f"with them; push the processor to '{repo_id}' as well."
        )
        return
    for name, placeholder in companions["files"].items():
        target = Path(directory, name)
        if placeholder is not None or not target.exists():
            content = (listing.parent / name).read_bytes()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.replace(placeholder.encode(), repo_id.encode()) if placeholder else content)


def read_companions(listing: Path) -> dict[str, dict]:
    """What `companions.json` holds, see [`add_companions`]; raises a `ValueError` if it is damaged, or names files
    outside its folder."""
    with told_of_damage(f"The list '{listing}'"):
        companions = json.loads(listing.read_text(encoding="utf-8"))
        files = {str(name): placeholder for name, placeholder in companions["files"].items()}
        weights = {str(name): str(digest) for name, digest in companions["weights"].items()}
        if not all(placeholder is None or isinstance(placeholder, str) for placeholder in files.values()):
            raise ValueError("placeholders are texts or null")
    require_inside(listing, [*files, *weights])
    return {"weights": weights, "files": files}


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafetensorsMixin:
    """
    For models that load from safetensors alone. One that was loaded from the directory of a stage is published with
    all that the stage left there for it, as long as its weights are what they were; any other one by itself.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As [`~transformers.PreTrainedModel.from_pretrained`]; raises an `OSError` if the checkpoint holds no weights
        in safetensors, and a `ValueError` if it lacks a weight or holds one that the model does not have."""
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        files = weight_files(pretrained_model_name_or_path, **hub_arguments)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub_arguments)
        require_room(pretrained_model_name_or_path, lambda: cls(config), files, part="")
        with_loading_info = kwargs.pop("output_loading_info", False)
        try:
            with bar_if_slow(sum(map(os.path.getsize, files))):
                model, loading = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    **kwargs | {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True},
                )
        except SafetensorError as error:
            raise ValueError(
                f"The weights of '{pretrained_model_name_or_path}' are damaged ({error}); download or save them again."
            ) from error
        mismatched = [name for name, *_ in loading["mismatched_keys"]]
        if mismatched:
            raise ValueError(
                f"The weights of '{pretrained_model_name_or_path}' have other shapes than its configuration says "
                f"({', '.join(sorted(mismatched)[:3])} ...); download or save it again."
            )
        # The library would draw a missing weight at random and only print a table of such weights.
        require_fit(pretrained_model_name_or_path, loading["missing_keys"], loading["unexpected_keys"])
        return (model, loading) if with_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ) -> None:
        """As [`~transformers.PreTrainedModel.save_pretrained`]; `push_to_hub=True` does what the method of that name
        does."""
        push_arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with bar_if_slow(self.get_memory_footprint()):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if push_to_hub and is_main_process:
            self.push_to_hub(push_arguments.pop("repo_id", Path(save_directory).name), **push_arguments)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        # What `push_to_hub` calls when it has saved the model.
        add_companions(working_dir, self.name_or_path, repo_id)
        kwargs["commit_message"] = kwargs.get("commit_message") or "Upload model"
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

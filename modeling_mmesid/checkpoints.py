"""What a checkpoint of this project is: a configuration of a format that this code reads, and weights in
safetensors."""

import os
from collections.abc import Iterable

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


# Raised when older code can no longer read what newer code writes; never when something optional is added.
FORMAT_VERSION = 1

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
    """For models that load from safetensors alone."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            OSError: If the checkpoint holds no weights in safetensors.
        """
        require_safetensors(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        )
        return super().from_pretrained(
            pretrained_model_name_or_path, *model_args, **kwargs | {"use_safetensors": True}
        )

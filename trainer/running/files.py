"""Files of settings: YAML, read and turned into flags, so that what a file says is checked as what a flag says."""

import json
from pathlib import Path

import yaml


def read_yaml(path: Path, what: str):
    """
    The content of a YAML file.

    Args:
        path (`Path`): The file.
        what (`str`): What it should be, for errors: "recipe".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} '{path}'; correct the path, relative to '{Path.cwd()}'.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}.") from error


def to_flags(settings: dict) -> list[str]:
    """Settings as flags; one that is null is left out, and an empty list is a flag without a value."""
    flags = []
    for key, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict | bool):
            flags.append(f"--{key}={json.dumps(value)}")
        else:
            flags.append(f"--{key}={value}")
    return flags

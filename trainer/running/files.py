"""Files of settings: YAML, read and turned into flags, so that what a file says is checked as what a flag says."""

import json
from collections.abc import Container
from pathlib import Path

import yaml


def read_yaml(path: Path, what: str):
    """The content of a YAML file, which errors call `what`; raises `FileNotFoundError` if there is no such file, and
    `ValueError` if it is not YAML in UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} '{path}'; correct the path, relative to '{Path.cwd()}'.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}.") from error


def check_names(settings: dict, known: Container[str], where: str, stage: str) -> None:
    """Raises `ValueError` if a setting is none of the stage's known ones."""
    for name in settings:
        if name not in known:
            raise ValueError(f"{where} sets '{name}', which the stage does not have; see `mmesid {stage} --help`.")


def to_flags(settings: dict) -> list[str]:
    """Settings as flags; one that is null is left out, and an empty list is a flag without a value."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return flags

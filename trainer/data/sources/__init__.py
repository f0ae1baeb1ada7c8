"""
The sources that `mmesid prepare` reads: a new one is a reader in a file of this folder and a line here.

A reader returns a [`~mmesid.trainer.data.source.Source`]. Its parameters are the settings that belong to the source,
under the names of the stage's flags: one without a default must be given. `interactions` and `items` are a
[`~mmesid.trainer.data.table_files.TableLocation`] each, `pictures` is what `image_dir` holds.
"""

import inspect
from collections.abc import Callable
from importlib import import_module


# Module and function, imported when the source is read.
SOURCES = {
    "synthetic": "synthetic:generate_catalogue",
    "sequences": "sequence_files:read_sequence_files",
    "amazon_2014": "amazon:read_amazon_2014",
    "amazon_2018": "amazon:read_amazon_2018",
    "amazon_2023": "amazon:read_amazon_2023",
    "movielens": "movielens:read_movielens",
    "tabular": "tabular:read_tabular",
}

# The settings that the parameter `pictures` is made of.
PICTURES = ("image_dir", "image_cache_dir", "download_images", "allow_private_addresses")


def reader_of(source: str) -> Callable:
    """
    The reader of a source.

    Raises:
        ValueError: If there is no source of this name.
    """
    if source not in SOURCES:
        raise ValueError(f"There is no source '{source}'; choose one of {', '.join(SOURCES)}.")
    module, name = SOURCES[source].split(":")
    return getattr(import_module(f".{module}", __package__), name)


def settings_of(source: str) -> dict[str, bool]:
    """The settings that a source uses, and whether it needs them."""
    settings: dict[str, bool] = {}
    for name, parameter in inspect.signature(reader_of(source)).parameters.items():
        settings |= dict.fromkeys(PICTURES if name == "pictures" else (name,), parameter.default is parameter.empty)
    return settings

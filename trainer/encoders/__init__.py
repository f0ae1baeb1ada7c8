"""
The encoders that `mmesid embed` knows by name: a new one is a file of this folder and a line here.

An encoder is a [`~mmesid.trainer.encoders.encoding.PretrainedEncoder`]: its class says what it reads of an item and
what its model is, and the parameters of its `from_pretrained` are the settings that belong to it, under the names of
the stage's flags.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .encoding import PretrainedEncoder


# Module and class, imported when the encoder is used: an extra that one of them takes is not missed by the others.
ENCODERS = {
    "sasrec": "sasrec:SASRecEncoder",
    "sentence": "sentence:SentenceEncoder",
    "vision": "vision:VisionEncoder",
    "dual_encoder": "dual_encoder:DualEncoder",
    "llm2clip": "llm2clip:LLM2CLIPEncoder",
}


def encoder_class(kind: str | None) -> "type[PretrainedEncoder]":
    """The class of an encoder; `ValueError` if there is none of this name, or a package that it takes is missing."""
    if kind not in ENCODERS:
        raise ValueError(f"There is no encoder '{kind}'; choose one of {', '.join(ENCODERS)}.")
    module, name = ENCODERS[kind].split(":")
    try:
        return getattr(import_module(f".{module}", __package__), name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The encoder {kind} takes the package '{error.name}', which is not installed; install it with pip."
        ) from error


def settings_of(kind: str | None) -> set[str]:
    """The settings that an encoder uses besides the name of its model."""
    return set(inspect.signature(encoder_class(kind).from_pretrained).parameters) - {"name_or_path"}


def load_encoder(kind: str | None, name_or_path: str, **settings):
    """
    Loads an encoder, a key of `ENCODERS`, with a model: a directory or a name on the Hub. `settings` are parameters of
    its `from_pretrained`, such as `revision`, `dtype` (`torch.dtype`) and `trust_remote_code`.
    """
    for name in settings.keys() - settings_of(kind):
        raise ValueError(f"The encoder {kind} has no use for {name}, got {settings[name]!r}; leave it out.")
    if settings.get("trust_remote_code"):
        from .remote_code import refuse_foreign_code, refuse_unpinned_code

        refuse_unpinned_code(name_or_path, settings.get("revision"))
        refuse_foreign_code(name_or_path, settings.get("revision"))
    return encoder_class(kind).from_pretrained(name_or_path, **settings)

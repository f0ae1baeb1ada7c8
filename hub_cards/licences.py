"""Licences: as the Hub knows them, and as the card of a base model states them."""

import os

from huggingface_hub import ModelCard
from transformers.utils import cached_file

from .names import slug


# Licences by the identifier under which the Hub knows them; any other text becomes `license: other` with a name.
HUB_LICENCES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma "
    "unknown".split()
)


def model_licence(name_or_path: str | os.PathLike | None, revision: str | None = None) -> str | None:
    """
    The licence that the card of a model states.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*): A directory, or a repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit.

    Returns:
        `str` or `None`: The licence; `None` without a model, a card, a licence on the card, or a way to the Hub.
    """
    if name_or_path is None:
        return None
    path = cached_file(
        name_or_path,
        "README.md",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    card = ModelCard.load(path, ignore_metadata_errors=True).data
    return card.get("license_name") or card.license


def licence_metadata(*licences: str | None) -> dict:
    """
    The licences under which something was made, as the front matter of its card: those that the Hub knows by their
    identifier, anything else, and several at once, as `other` with a name.
    """
    stated = list(dict.fromkeys(text for text in licences if text))
    if not stated:
        return {}
    if len(stated) == 1 and stated[0].lower() in HUB_LICENCES:
        return {"license": stated[0].lower()}
    return {"license": "other", "license_name": slug(" and ".join(stated), "see-the-card")}

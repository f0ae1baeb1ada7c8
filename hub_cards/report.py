"""The page about a run: results, example users, data and trainings in one HTML file that needs nothing beside it."""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .cards import PICTURE_NOTES, SPLITS, duration, label
from .names import name_or, printable


# Metrics of the table of results, as far as they were measured.
COLUMNS = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20", "mrr")


def render_report(page: dict) -> str:
    """
    The text of the page.

    Args:
        page (`dict`): `source`, `synthetic`, `statistics` of the data; `results`, by split and model a dictionary of
            metrics, `intervals`, by model those on test, and `differences`, by model how far `recommender` is above;
            `users`, each with `user_id`, `history`, `earlier` (how many items came before it), `recommended` and
            `target`; `recommender`, the name of the model that they are from; `sources`, what its scores are made of;
            `stages`, each with `name`, `record` and `pictures` by name. An item has `title`, `item_id` and `picture`,
            a recommended one `score`, `contributions` and `reason` as well. Pictures are `data:` addresses.

    Returns:
        `str`: HTML. What comes from the data is escaped.
    """
    on_validation = page["results"].get("validation", {})
    return _ENVIRONMENT.get_template("report.html.jinja").render(
        page=page,
        best_on_validation=max(on_validation, key=lambda name: on_validation[name]["ndcg@10"], default=None),
        columns=COLUMNS,
        splits=SPLITS,
        picture_notes=PICTURE_NOTES,
        source_notes=_source_notes(page["sources"]),
    )


def inline(content: bytes, kind: str = "png") -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def inline_file(path: Path) -> str:
    return inline(path.read_bytes())


def _value(value) -> str:
    """A value as a reader wants it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 1):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return printable(str(value))


def source_label(name: str) -> str:
    """What a source of scores is called in prose: `text_similarity` as "similar text"."""
    if name.endswith("_similarity"):
        return f"similar {name.removesuffix('_similarity')}"
    return {"id": "ID vector", "sasrec": "SASRec"}.get(name, name)


def most_of_its_score(contributions: dict[str, float]) -> str:
    """What a recommended item owes most of its score to, in words."""
    name = max(contributions, key=lambda name: contributions[name])
    if name == "sasrec":
        source = "SASRec"
    elif name.endswith("_similarity"):
        source = f"being alike by {name.removesuffix('_similarity')}"
    else:
        source = f"its {source_label(name)}"
    return f"owes most of its score to {source}"


def _source_notes(sources: list[str]) -> dict[str, list[str]]:
    """What sources are, for a reader of the page, with those of which each note is true."""
    notes: dict[str, list[str]] = {}
    for name in sources:
        if name.endswith("_similarity"):
            note = "how much the item is like the latest ones of the history"
        elif name == "sasrec":
            note = "what a small model says that knows nothing but the order of items"
        elif name == "id":
            note = "what training learnt of this item beyond what it is made of"
        else:
            note = "what the language model sees in that part of the item"
        notes.setdefault(note, []).append(source_label(name))
    return notes


def _difference(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


_ENVIRONMENT = Environment(
    loader=PackageLoader("mmesid.hub_cards"),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    difference=_difference,
    duration=duration,
    label=label,
    name_or=name_or,
    printable=printable,
    source=source_label,
    value=_value,
)

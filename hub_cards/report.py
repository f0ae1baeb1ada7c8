"""The page about a run: results, example users, data and trainings in one HTML file that needs nothing beside it."""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .cards import METRIC_LABELS, duration
from .names import name_or, printable


# Metrics of the table of results, as far as they were measured.
COLUMNS = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20", "mrr")


def render_report(page: dict) -> str:
    """
    The text of the page.

    Args:
        page (`dict`): `source`, `synthetic`, `statistics` of the data; `results`, by split and model a dictionary of
            metrics, and `intervals`, by model those on test; `users`, each with `user_id`, `history`, `earlier` (how
            many items came before it), `recommended` and `target`; `recommender`, the name of the model that they are
            from; `stages`, each with `name`, `record` and `pictures`. An item has `title`, `item_id` and `picture`, a
            recommended one `score`, `contributions` and `reason` as well. Pictures are `data:` addresses.

    Returns:
        `str`: HTML. What comes from the data is escaped.
    """
    return _ENVIRONMENT.get_template("report.html.jinja").render(page=page, columns=COLUMNS)


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


def _metric(name: str) -> str:
    family, at, k = name.partition("@")
    return METRIC_LABELS.get(family, family.replace("_", " ")) + at + k


_ENVIRONMENT = Environment(
    loader=PackageLoader("mmesid.hub_cards"),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(duration=duration, metric=_metric, name_or=name_or, printable=printable, value=_value)

"""What the demo looks like: items, bars and sentences as HTML, in which titles and ids are nothing but text."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from mmesid.hub_cards.report import most_of_its_score, source_label

from .showcase import Recommended, Showcase


THUMBNAIL = 160
# Some kilobytes each.
PICTURES_KEPT = 4096
NUMBERS = ("no", "first", "first two", "first three", "first four", "first five", "first six")
COLOURS = ("#4263eb", "#f08c00", "#2b8a3e", "#c2255c", "#0c8599", "#862e9c")
# Whatever stands in double braces is escaped.
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_HTML: Any = _TEMPLATES.get_template("cards.html.jinja").module
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


class Cards:
    """Pieces of the page for one [`Showcase`]."""

    def __init__(self, showcase: Showcase):
        self.showcase = showcase
        self.colours = dict(zip(showcase.sources, COLOURS * len(showcase.sources)))
        self._thumbnail = lru_cache(PICTURES_KEPT)(self._new_thumbnail)

    def heading(self, name: str, is_synthetic: bool = False) -> str:
        """Name, size and sources of the model."""
        sources = map(source_label, self.showcase.sources)
        return str(_HTML.heading(name, self.showcase.num_items, sources, is_synthetic))

    def items(self, rows: Sequence[int], action: str, hint: str, empty: str = "") -> str:
        """Items to click: a click sends their row and the action."""
        items = [self._item(row) for row in rows]
        return str(_HTML.items(items, action, hint, empty))

    def ranking(self, recommended: Sequence[Recommended], history: Sequence[int]) -> str:
        """Recommendations, best first, with bars on one scale."""
        values = [value for one in recommended for value in (0.0, *one.contributions.values())]
        low, high = min(values), max(values)
        scale = 100 / ((high - low) or 1.0)
        items = []
        for one in recommended:
            bars = [
                {
                    "name": source_label(name),
                    "value": value,
                    "left": round((min(value, 0.0) - low) * scale, 2),
                    "width": round(abs(value) * scale, 2),
                    "colour": self.colours[name],
                }
                for name, value in one.contributions.items()
            ]
            note = ""
            if (nearest := self.showcase.nearest_of_history(one.row, history)) is not None:
                modality, shared, row = nearest
                note = f"{self._sharing(shared, modality)} “{self.showcase.titles[row]}” of the history"
            elif (alike := self.showcase.most_alike(one.row, history)) is not None:
                modality, row = alike
                note = f"is most like “{self.showcase.titles[row]}” of the history by {modality}"
            else:
                note = most_of_its_score(one.contributions)
            items.append(self._item(one.row) | {"score": one.score, "bars": bars, "note": note})
        legend = [(source_label(name), self.colours[name]) for name in recommended[0].contributions]
        return str(_HTML.ranking(items, legend))

    def kin(self, row: int, count: int) -> str:
        """The neighbours of an item by semantic ID, for each modality."""
        title = self.showcase.titles[row]
        if not self.showcase.codes:
            return self.sentence("This recommender was made without semantic IDs.")
        page = []
        for modality, codes in self.showcase.codes.items():
            own = codes[row].tolist()
            page.append(_HTML.kin_heading(title, modality, own if own[0] >= 0 else None))
            kin = self.showcase.kin(row, modality, count)
            items = [self._item(one) | {"note": self._sharing(shared, modality) + " it"} for one, shared in kin]
            empty = "No other item shares its first code."
            page.append(_HTML.items(items, "add", "Add to the history:", empty))
        return "".join(page)

    def sentence(self, text: str) -> str:
        """One sentence to the user."""
        return str(_HTML.sentence(text))

    def _sharing(self, shared: int, modality: str) -> str:
        number = NUMBERS[shared] if shared < len(NUMBERS) else f"first {shared}"
        return f"shares its {number} {modality} {'code' if shared == 1 else 'codes'} with"

    def _item(self, row: int) -> dict:
        picture = self._thumbnail(row)
        return {
            "row": row,
            "id": self.showcase.item_id(row),
            "title": self.showcase.titles[row],
            "picture": picture,
            "hue": row * 47 % 360,
        }

    def _new_thumbnail(self, row: int) -> str:
        """The picture of an item as JPEG in base64, a few kilobytes; empty where there is none."""
        picture = self.showcase.picture(row)
        if picture is None:
            return ""
        picture = picture.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
        return base64.b64encode(file.getvalue()).decode()

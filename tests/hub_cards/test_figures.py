"""Pictures are PNG files that show what they are given."""

import numpy as np
from PIL import Image

from mmesid.hub_cards.figures import draw_code_use, draw_distances


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("L"))


def test_code_use_has_a_panel_a_modality_and_shows_the_codes(tmp_path):
    even = np.repeat(np.arange(64)[:, None] % 8, 2, axis=1)
    draw_code_use(tmp_path / "one.png", {"text": even}, 8)
    draw_code_use(tmp_path / "two.png", {"text": even, "visual": np.full((3, 2), -1)}, 8)
    draw_code_use(tmp_path / "skewed.png", {"text": even.clip(max=1)}, 8)
    one, two, skewed = (pixels(tmp_path / f"{name}.png") for name in ("one", "two", "skewed"))
    assert two.shape[1] > 1.5 * one.shape[1]
    assert one.shape == skewed.shape and (one != skewed).any()


def test_distances_are_drawn_as_points(tmp_path):
    before = np.linspace(0, 1, 20_000)
    for name, after in {"kept": before, "lost": np.ones_like(before)}.items():
        draw_distances(tmp_path / f"{name}.png", {"text": (before, after)}, {"text": name})
    kept, lost = (pixels(tmp_path / f"{name}.png") for name in ("kept", "lost"))
    middle = slice(kept.shape[1] // 3, 2 * kept.shape[1] // 3)
    # A diagonal covers many rows of the panel's middle, a level line few.
    inked = [(values[60:-80, middle] < 250).any(1).sum() for values in (kept, lost)]
    assert inked[0] > 3 * inked[1]

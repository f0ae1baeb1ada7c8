"""Product pictures: the category is the shape, colour and pattern fill it, the style is the backdrop."""

import io

import numpy as np
from PIL import Image, ImageDraw


SIZE = 64
# Drawn this much larger and scaled down, for smooth edges.
SCALE = 2
CANVAS = SIZE * SCALE

COLOURS = {
    "red": (200, 40, 45),
    "orange": (240, 130, 30),
    "yellow": (240, 205, 50),
    "green": (50, 140, 60),
    "teal": (30, 165, 165),
    "blue": (45, 80, 190),
    "violet": (120, 60, 170),
    "pink": (240, 130, 180),
    "brown": (125, 80, 45),
    "black": (45, 45, 50),
}
BACKDROPS = {
    "classic": (236, 236, 236),
    "sporty": (205, 232, 246),
    "vintage": (240, 222, 188),
    "minimal": (255, 255, 255),
    "bohemian": (228, 212, 240),
}
# Where the lighter ink lies, by coordinates in periods of the pattern.
PATTERNS = {
    "plain": lambda x, y: np.zeros(x.shape, bool),
    "striped": lambda x, y: y % 1 < 0.4,
    "dotted": lambda x, y: np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.28,
    "checked": lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    "zigzag": lambda x, y: (y + np.abs(x % 1 - 0.5)) % 1 < 0.4,
}
# What a category is drawn from, on a sheet of 100 x 100: polygons, and ellipses in boxes of four numbers. The last one
# carries the pattern, those behind it are a dark shade of the colour.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "t-shirt": [(32, 18, 68, 18, 94, 36, 84, 54, 72, 46, 72, 88, 28, 88, 28, 46, 16, 54, 6, 36)],
    "dress": [(36, 8, 42, 8, 45, 20, 55, 20, 58, 8, 64, 8, 66, 30, 60, 44, 82, 92, 18, 92, 40, 44, 34, 30)],
    "trousers": [(30, 8, 70, 8, 78, 94, 58, 94, 50, 36, 42, 94, 22, 94)],
    "skirt": [(34, 18, 66, 18, 66, 27, 34, 27), (34, 24, 66, 24, 92, 82, 8, 82)],
    "scarf": [(54, 30, 72, 30, 78, 87, 58, 87), (30, 30, 48, 34, 42, 95, 22, 93), (18, 10, 82, 48)],
    "sneakers": [(5, 72, 96, 72, 94, 82, 7, 82), (8, 40, 22, 34, 34, 42, 52, 36, 68, 54, 92, 62, 95, 74, 6, 74)],
    "boots": [(26, 79, 91, 79, 91, 88, 46, 92, 26, 92), (30, 8, 62, 8, 62, 54, 86, 64, 90, 80, 28, 80)],
    "socks": [(35, 6, 63, 6, 63, 18, 35, 18), (36, 14, 62, 14, 62, 52, 42, 88, 20, 90, 10, 76, 36, 50)],
    "cap": [(60, 54, 97, 66, 92, 72, 60, 64), (18, 60, 20, 42, 32, 27, 48, 22, 64, 27, 76, 42, 78, 60)],
    "handbag": [(30, 10, 70, 70), (14, 40, 86, 40, 92, 90, 8, 90)],
    "backpack": [(34, 4, 66, 34), (10, 54, 90, 88), (22, 22, 34, 12, 66, 12, 78, 22, 80, 92, 20, 92)],
    "watch": [(40, 4, 60, 4, 63, 96, 37, 96), (24, 26, 76, 76)],
    "sunglasses": [(2, 30, 98, 30, 92, 44, 8, 44), (4, 36, 96, 36, 90, 66, 62, 68, 50, 46, 38, 68, 10, 66)],
    "bottle": [(42, 5, 58, 5, 58, 24, 42, 24), (34, 34, 43, 18, 57, 18, 66, 34, 66, 94, 34, 94)],
    "mug": [(54, 32, 94, 76), (16, 20, 72, 20, 68, 86, 20, 86)],
    "teapot": [(66, 34, 97, 76), (26, 52, 6, 32, 3, 38, 20, 74), (40, 14, 56, 34), (18, 28, 78, 88)],
    "plate": [(5, 5, 95, 95), (16, 16, 84, 84)],
    "vase": [(38, 8, 62, 8, 56, 30, 76, 52, 72, 76, 60, 94, 40, 94, 28, 76, 24, 52, 44, 30)],
    "lamp": [(47, 44, 53, 44, 53, 88, 47, 88), (28, 82, 72, 95), (36, 8, 64, 8, 86, 50, 14, 50)],
    "armchair": [(8, 42, 28, 90), (72, 42, 92, 90), (22, 10, 78, 10, 80, 84, 20, 84)],
    "cushion": [(8, 8, 50, 15, 92, 8, 85, 50, 92, 92, 50, 85, 8, 92, 15, 50)],
}


def draw_product(category: str, colour: str, pattern: str, style: str, rng: np.random.Generator) -> bytes:
    """
    A PNG file of 64 x 64 pixels. Shade, pattern, size, angle and place vary a little with `rng`.

    Args:
        category, colour, pattern, style (`str`): Keys of `SHAPES`, `COLOURS`, `PATTERNS` and `BACKDROPS`.
        rng (`np.random.Generator`): Where the variation comes from.
    """
    value = np.clip(COLOURS[colour] + rng.integers(-12, 13, size=3), 0, 255)
    y, x = np.mgrid[:CANVAS, :CANVAS] / (SCALE * rng.uniform(9, 13)) + rng.uniform(size=2)[:, None, None]
    ink = PATTERNS[pattern](x, y)[..., None]
    # Three quarters of the way to white.
    fabric = Image.fromarray(np.where(ink, 191 + value // 4, value).astype(np.uint8))
    angle, size, place = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.8, 0.95), 0.5 + rng.uniform(-0.04, 0.04, size=2)
    turn = size / 100 * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    picture = Image.new("RGB", (CANVAS, CANVAS), BACKDROPS[style])
    *behind, front = SHAPES[category]
    for shape in behind:
        ImageDraw.Draw(picture).polygon(_outline(shape, turn, place), fill=tuple((value * 0.6).astype(int).tolist()))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).polygon(_outline(front, turn, place), fill=255)
    picture.paste(fabric, mask=mask)
    file = io.BytesIO()
    picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(file, format="PNG")
    return file.getvalue()


def _outline(shape: tuple[int, ...], turn: np.ndarray, place: np.ndarray) -> list[float]:
    """The corners of a shape on the canvas, x and y in turns; of an ellipse, forty points on it."""
    points = np.reshape(shape, (-1, 2))
    if len(shape) == 4:
        angles = np.linspace(0, 2 * np.pi, 40)
        points = points.mean(axis=0) + (points[1] - points[0]) / 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (CANVAS * (place + (points - 50) @ turn)).flatten().tolist()

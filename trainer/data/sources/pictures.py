"""Product pictures: the category is the shape, colour and pattern fill it, the style is the backdrop."""

import functools
import io

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter


SIZE = 64
# Drawn this much larger and scaled down, for smooth edges.
SCALE = 2
CANVAS = SIZE * SCALE

COLOUR_VALUES = {
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

# Category: (primitive, tone, coordinates on a 100 x 100 sheet), painted in this order. Tones: "fabric" carries the
# pattern, "dark" and "light" are shades of the colour, "metal" is grey, "backdrop" cuts a hole.
SHAPES: dict[str, list[tuple[str, str, tuple[float, ...]]]] = {
    "t-shirt": [
        ("polygon", "fabric", (32, 18, 68, 18, 94, 36, 84, 54, 72, 46, 72, 88, 28, 88, 28, 46, 16, 54, 6, 36)),
        ("ellipse", "backdrop", (40, 9, 60, 27)),
    ],
    "dress": [
        ("polygon", "fabric", (36, 8, 42, 8, 45, 20, 55, 20, 58, 8, 64, 8, 66, 30, 60, 44, 40, 44, 34, 30)),
        ("polygon", "fabric", (40, 44, 60, 44, 82, 92, 18, 92)),
        ("polygon", "dark", (40, 42, 60, 42, 61, 48, 39, 48)),
    ],
    "trousers": [
        ("polygon", "fabric", (30, 8, 70, 8, 78, 94, 58, 94, 50, 36, 42, 94, 22, 94)),
        ("polygon", "dark", (30, 8, 70, 8, 70.5, 15, 29.5, 15)),
    ],
    "skirt": [
        ("polygon", "fabric", (34, 24, 66, 24, 92, 82, 8, 82)),
        ("polygon", "dark", (34, 18, 66, 18, 66, 27, 34, 27)),
    ],
    "scarf": [
        ("polygon", "fabric", (54, 30, 72, 30, 78, 84, 58, 84)),
        ("polygon", "fabric", (30, 30, 48, 34, 42, 92, 22, 90)),
        ("ellipse", "fabric", (18, 10, 82, 48)),
        ("ellipse", "backdrop", (34, 16, 66, 32)),
        ("polygon", "dark", (22, 88, 42, 90, 42, 95, 22, 93)),
        ("polygon", "dark", (58, 82, 78, 82, 78, 87, 58, 87)),
    ],
    "sneakers": [
        ("polygon", "fabric", (8, 40, 22, 34, 34, 42, 52, 36, 68, 54, 92, 62, 95, 74, 6, 74)),
        ("polygon", "light", (5, 72, 96, 72, 94, 82, 7, 82)),
        ("line", "light", (46, 46, 56, 40)),
        ("line", "light", (52, 51, 61, 46)),
        ("line", "light", (58, 56, 66, 52)),
    ],
    "boots": [
        ("polygon", "fabric", (30, 8, 62, 8, 62, 54, 86, 64, 90, 80, 28, 80)),
        ("polygon", "dark", (26, 79, 91, 79, 91, 88, 56, 88, 54, 85, 46, 85, 46, 92, 26, 92)),
        ("polygon", "dark", (29, 8, 63, 8, 63, 15, 29, 15)),
    ],
    "socks": [
        ("polygon", "fabric", (36, 8, 62, 8, 62, 52, 42, 88, 20, 90, 10, 76, 36, 50)),
        ("polygon", "light", (35, 6, 63, 6, 63, 18, 35, 18)),
        ("ellipse", "dark", (8, 72, 28, 92)),
    ],
    "cap": [
        ("pieslice", "fabric", (18, 22, 78, 96, 180, 360)),
        ("polygon", "dark", (62, 56, 78, 54, 97, 66, 92, 72, 60, 64)),
        ("ellipse", "dark", (44, 18, 52, 26)),
    ],
    "handbag": [
        ("arc", "dark", (30, 8, 70, 70, 180, 360)),
        ("polygon", "fabric", (16, 40, 84, 40, 93, 88, 7, 88)),
        ("polygon", "dark", (16, 38, 84, 38, 85, 46, 15, 46)),
        ("ellipse", "metal", (45, 42, 55, 52)),
    ],
    "backpack": [
        ("arc", "dark", (38, 2, 62, 30, 180, 360)),
        ("rounded", "fabric", (24, 14, 76, 92)),
        ("rounded", "dark", (32, 54, 68, 84)),
        ("line", "light", (30, 40, 70, 40)),
        ("polygon", "dark", (14, 44, 24, 40, 24, 84, 14, 80)),
        ("polygon", "dark", (86, 44, 76, 40, 76, 84, 86, 80)),
    ],
    "watch": [
        ("polygon", "fabric", (40, 4, 60, 4, 63, 96, 37, 96)),
        ("ellipse", "metal", (24, 26, 76, 76)),
        ("ellipse", "light", (31, 33, 69, 69)),
        ("line", "dark", (50, 51, 50, 38)),
        ("line", "dark", (50, 51, 60, 55)),
    ],
    "sunglasses": [
        ("line", "fabric", (8, 44, 2, 30)),
        ("line", "fabric", (92, 44, 98, 30)),
        ("ellipse", "fabric", (4, 34, 46, 72)),
        ("ellipse", "fabric", (54, 34, 96, 72)),
        ("ellipse", "dark", (12, 41, 38, 65)),
        ("ellipse", "dark", (62, 41, 88, 65)),
        ("line", "fabric", (44, 46, 56, 46)),
    ],
    "bottle": [
        ("rounded", "fabric", (34, 26, 66, 94)),
        ("polygon", "fabric", (34, 34, 43, 18, 57, 18, 66, 34)),
        ("rounded", "metal", (41, 5, 59, 20)),
    ],
    "mug": [
        ("arc", "dark", (56, 34, 94, 76, 270, 450)),
        ("polygon", "fabric", (16, 22, 72, 22, 68, 86, 20, 86)),
        ("ellipse", "dark", (16, 16, 72, 30)),
    ],
    "teapot": [
        ("arc", "dark", (66, 34, 97, 76, 260, 460)),
        ("polygon", "fabric", (26, 52, 6, 32, 3, 38, 20, 74)),
        ("ellipse", "fabric", (18, 30, 78, 88)),
        ("ellipse", "dark", (34, 24, 62, 38)),
        ("ellipse", "dark", (44, 15, 52, 25)),
    ],
    "plate": [
        ("ellipse", "fabric", (5, 5, 95, 95)),
        ("ellipse", "light", (24, 24, 76, 76)),
        ("ellipse", "fabric", (38, 38, 62, 62)),
    ],
    "vase": [
        ("polygon", "fabric", (38, 8, 62, 8, 56, 30, 76, 52, 72, 76, 60, 94, 40, 94, 28, 76, 24, 52, 44, 30)),
        ("ellipse", "dark", (37, 4, 63, 12)),
    ],
    "lamp": [
        ("polygon", "metal", (47, 44, 53, 44, 53, 88, 47, 88)),
        ("ellipse", "dark", (28, 82, 72, 95)),
        ("polygon", "fabric", (36, 8, 64, 8, 86, 50, 14, 50)),
    ],
    "armchair": [
        ("polygon", "metal", (20, 82, 27, 82, 24, 96, 19, 96)),
        ("polygon", "metal", (73, 82, 80, 82, 81, 96, 76, 96)),
        ("rounded", "fabric", (20, 10, 80, 70)),
        ("rounded", "dark", (8, 42, 28, 86)),
        ("rounded", "dark", (72, 42, 92, 86)),
        ("rounded", "light", (26, 56, 74, 76)),
        ("polygon", "dark", (24, 74, 76, 74, 76, 86, 24, 86)),
    ],
    "cushion": [
        ("polygon", "fabric", (8, 8, 50, 15, 92, 8, 85, 50, 92, 92, 50, 85, 8, 92, 15, 50)),
        ("ellipse", "dark", (46, 46, 54, 54)),
    ],
}  # fmt: skip


def draw_product(category: str, colour: str, pattern: str, style: str, rng: np.random.Generator) -> bytes:
    """
    A 64 x 64 picture of a product. Position, size, angle, shade and pattern vary a little with `rng`.

    Args:
        category (`str`): A key of `SHAPES`.
        colour (`str`): A key of `COLOUR_VALUES`.
        pattern (`str`): `"plain"`, `"striped"`, `"dotted"`, `"checked"` or `"zigzag"`.
        style (`str`): A key of `BACKDROPS`.
        rng (`np.random.Generator`): Where the variation comes from.

    Returns:
        `bytes`: A PNG file.
    """
    value = tuple(
        int(channel) for channel in np.clip(np.array(COLOUR_VALUES[colour]) + rng.integers(-12, 13, size=3), 0, 255)
    )
    backdrop = BACKDROPS[style]
    fabric = _fabric(value, pattern, rng)
    tones = {"dark": _mix(value, (0, 0, 0), 0.4), "light": _mix(value, (255, 255, 255), 0.7), "metal": (150, 152, 158)}

    product = Image.new("RGB", (CANVAS, CANVAS))
    outline = Image.new("L", (CANVAS, CANVAS))
    for primitive, tone, coordinates in SHAPES[category]:
        mask = Image.new("L", (CANVAS, CANVAS))
        _paint(ImageDraw.Draw(mask), primitive, coordinates)
        if tone == "backdrop":
            outline = ImageChops.subtract(outline, mask)
        else:
            product.paste(fabric if tone == "fabric" else Image.new("RGB", product.size, tones[tone]), mask=mask)
            outline = ImageChops.lighter(outline, mask)
    product = ImageChops.multiply(product, _light())

    angle, size = rng.uniform(-8, 8), rng.uniform(0.8, 0.95)
    shift = rng.integers(-5, 6, size=2) * SCALE // 2
    placed = int(CANVAS * size)
    left, top = (int(value) for value in (CANVAS - placed) // 2 + shift)
    product = product.resize((placed, placed)).rotate(angle, Image.Resampling.BICUBIC)
    outline = outline.resize((placed, placed)).rotate(angle, Image.Resampling.BICUBIC)

    picture = Image.new("RGB", (CANVAS, CANVAS), backdrop)
    shadow = Image.new("L", picture.size)
    shadow.paste(outline.point(lambda alpha: alpha * 2 // 5), (left + 2 * SCALE, top + 2 * SCALE))
    picture.paste((60, 60, 70), mask=shadow.filter(ImageFilter.GaussianBlur(2 * SCALE)))
    picture.paste(product, (left, top), mask=outline)

    file = io.BytesIO()
    picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(file, format="PNG")
    return file.getvalue()


def _mix(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other))


@functools.cache
def _light() -> Image.Image:
    """Light from above: the foot of a product is a quarter darker than its top."""
    column = np.linspace(255, 190, CANVAS).astype(np.uint8)
    return Image.fromarray(np.repeat(np.repeat(column[:, None, None], CANVAS, axis=1), 3, axis=2))


def _paint(draw: ImageDraw.ImageDraw, primitive: str, coordinates: tuple[float, ...]) -> None:
    unit = CANVAS / 100
    points = [coordinate * unit for coordinate in coordinates[:4]]
    angles = coordinates[4:]
    if primitive == "polygon":
        draw.polygon([coordinate * unit for coordinate in coordinates], fill=255)
    elif primitive == "ellipse":
        draw.ellipse(points, fill=255)
    elif primitive == "rounded":
        draw.rounded_rectangle(points, radius=10 * unit, fill=255)
    elif primitive == "pieslice":
        draw.pieslice(points, start=angles[0], end=angles[1], fill=255)
    elif primitive == "arc":
        draw.arc(points, start=angles[0], end=angles[1], fill=255, width=round(6 * unit))
    else:
        draw.line(points, fill=255, width=round(5 * unit))


def _fabric(colour: tuple[int, ...], pattern: str, rng: np.random.Generator) -> Image.Image:
    """The whole sheet covered with a pattern in the colour and a much lighter one."""
    y, x = np.mgrid[:CANVAS, :CANVAS] / SCALE + rng.uniform(0, 12, size=2)[:, None, None]
    period = rng.uniform(9, 13)
    if pattern == "plain":
        ink = np.zeros(x.shape, bool)
    elif pattern == "striped":
        ink = (y % period) < 0.4 * period
    elif pattern == "dotted":
        ink = np.hypot(x % period - period / 2, y % period - period / 2) < 0.28 * period
    elif pattern == "checked":
        ink = ((x % period) < period / 2) ^ ((y % period) < period / 2)
    else:
        ink = ((y + np.abs(x % period - period / 2)) % period) < 0.4 * period
    paint = np.where(ink[..., None], _mix(colour, (255, 255, 255), 0.75), colour)
    return Image.fromarray(paint.astype(np.uint8))

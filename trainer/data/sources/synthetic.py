"""
A generated shop: items with attributes, titles and descriptions composed from them, pictures drawn from them, and
users who buy by taste, by what goes with their last purchase, and by popularity.

Everything follows from the seed. Nothing in it is real: `Source.synthetic` is true, and every later stage says so.
"""

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ..source import Catalogue, CatalogueBuilder, Interactions, Source
from .pictures import COLOURS, PATTERNS, draw_product


# Category: department, materials, and the categories bought after it.
CATEGORIES = {
    "t-shirt": ("clothing", ("cotton", "linen", "jersey"), ("trousers", "sneakers", "cap")),
    "dress": ("clothing", ("cotton", "linen", "silk"), ("handbag", "scarf", "sunglasses")),
    "trousers": ("clothing", ("cotton", "denim", "linen"), ("t-shirt", "boots", "sneakers")),
    "skirt": ("clothing", ("denim", "linen", "silk"), ("t-shirt", "handbag", "boots")),
    "scarf": ("clothing", ("wool", "silk", "cashmere"), ("boots", "dress", "handbag")),
    "sneakers": ("shoes", ("canvas", "leather", "mesh"), ("socks", "cap", "backpack")),
    "boots": ("shoes", ("leather", "suede", "rubber"), ("socks", "scarf", "trousers")),
    "socks": ("shoes", ("cotton", "wool", "bamboo"), ("sneakers", "boots", "t-shirt")),
    "cap": ("accessories", ("cotton", "canvas", "wool"), ("sunglasses", "t-shirt", "bottle")),
    "handbag": ("accessories", ("leather", "canvas", "suede"), ("watch", "dress", "scarf")),
    "backpack": ("accessories", ("canvas", "nylon", "leather"), ("bottle", "cap", "sneakers")),
    "watch": ("accessories", ("steel", "leather", "titanium"), ("sunglasses", "handbag", "bottle")),
    "sunglasses": ("accessories", ("acetate", "titanium", "bamboo"), ("watch", "cap", "dress")),
    "bottle": ("accessories", ("steel", "glass", "titanium"), ("backpack", "cap", "socks")),
    "mug": ("home", ("porcelain", "stoneware", "enamel"), ("teapot", "plate", "vase")),
    "teapot": ("home", ("porcelain", "stoneware", "glass"), ("mug", "plate", "vase")),
    "plate": ("home", ("porcelain", "stoneware", "bamboo"), ("mug", "teapot", "lamp")),
    "vase": ("home", ("glass", "porcelain", "stoneware"), ("lamp", "cushion", "plate")),
    "lamp": ("home", ("steel", "paper", "glass"), ("armchair", "cushion", "vase")),
    "armchair": ("home", ("velvet", "leather", "linen"), ("cushion", "lamp", "vase")),
    "cushion": ("home", ("velvet", "linen", "wool"), ("armchair", "lamp", "vase")),
}  # fmt: skip
# Style: what a description says of it.
STYLES = {
    "classic": "A timeless piece that never looks out of place",
    "sporty": "Made for days on the move",
    "vintage": "Inspired by the flea markets of the seventies",
    "minimal": "Clean lines and nothing that is not needed",
    "bohemian": "Playful, relaxed and a little different every time",
}
BRANDS = (
    "Norvik", "Calla", "Fernhill", "Ostara", "Lumen & Co", "Pinto",
    "Rivermark", "Sable", "Tidewell", "Umbra Lane", "Veldt", "Wrenfield",
)  # fmt: skip
SYLLABLES = "al be cor da el fi go ha is jo ka lu mi no or pa ri so ta vi".split()

# What a user's liking for an item is a sum of, besides the logarithm of its popularity: what a match with the user's
# taste is worth, and what one with the last purchase is.
LIKES = {"department": 0.75, "colour": 1.5, "pattern": 1.0, "style": 1.75, "brand": 1.0}
GOES_WITH_LAST = 2.75
SAME_AS_LAST = {"colour": 1.0, "style": 0.75}
SAME_CATEGORY_AS_LAST = -1.5

# Popularity is (rank + offset) ** -exponent: Zipf's law with Mandelbrot's flatter head.
ZIPF_EXPONENT = 1.5
ZIPF_OFFSET = 60
# New arrivals are items that hardly anybody has come across.
NEW_ARRIVALS = 0.04
NEW_ARRIVAL_PENALTY = 3.0
TASTES_A_USER = 2
CHANGE_OF_TASTE = 0.15
SHORTEST, LONGEST, MEAN_LENGTH = 5, 30, 9

# A picture shows category, colour, pattern and style; a title has the category, each of the others only so often.
NAMED_IN_TITLE = 0.7
WITHOUT_PICTURE = 0.02
WITHOUT_DESCRIPTION = 0.1


@dataclass
class Attributes:
    """What the items are: `(items,)` positions in the vocabularies above and among a category's materials."""

    category: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    style: np.ndarray
    brand: np.ndarray
    material: np.ndarray

    @property
    def department(self) -> np.ndarray:
        """The departments of the categories, `(items,)`."""
        departments = [department for department, _, _ in CATEGORIES.values()]
        return np.unique(departments, return_inverse=True)[1][self.category]


def generate_catalogue(num_items: int = 600, num_users: int = 3000, seed: int = 0) -> Source:
    """
    Generates a shop.

    Args:
        num_items (`int`, *optional*, defaults to `600`): Items; the rarest of them may never be bought.
        num_users (`int`, *optional*, defaults to `3000`): Users, with 5 to 30 purchases each, 9 on average.
        seed (`int`, *optional*, defaults to `0`): Equal seeds give equal shops, pictures included.

    Raises:
        ValueError: If there are fewer items than the longest sequence needs, or no users.
    """
    if num_items < 2 * LONGEST or num_users < 1:
        raise ValueError(
            f"A synthetic catalogue needs {2 * LONGEST} items and 1 user at least, got {num_items} and {num_users}; "
            "raise num_items or num_users."
        )
    # One stream per part: more users leave the items as they are.
    item_rng, picture_rng, user_rng = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(3))
    attributes = draw_attributes(num_items, item_rng)
    return Source(
        name=f"Synthetic shop, seed {seed}",
        licence="Apache-2.0",
        synthetic=True,
        catalogue=compose_catalogue(attributes, item_rng, picture_rng),
        interactions=draw_interactions(attributes, num_users, user_rng),
    )


def draw_attributes(num_items: int, rng: np.random.Generator) -> Attributes:
    """Attributes of every item; brands have a house style and a favourite colour."""

    def draw(size: int, count: int = num_items) -> np.ndarray:
        return rng.integers(size, size=count)

    house_style, house_colour = draw(len(STYLES), len(BRANDS)), draw(len(COLOURS), len(BRANDS))
    brand = draw(len(BRANDS))
    return Attributes(
        brand=brand,
        style=np.where(rng.random(num_items) < 0.5, house_style[brand], draw(len(STYLES))),
        colour=np.where(rng.random(num_items) < 0.2, house_colour[brand], draw(len(COLOURS))),
        category=draw(len(CATEGORIES)),
        pattern=draw(len(PATTERNS)),
        material=draw(3),
    )


def compose_catalogue(attributes: Attributes, rng: np.random.Generator, picture_rng: np.random.Generator) -> Catalogue:
    """Titles, texts and pictures of the items."""
    builder = CatalogueBuilder(["title", "attributes", "description"])
    vocabularies = [list(words) for words in (CATEGORIES, COLOURS, PATTERNS, STYLES, BRANDS)]
    for item in tqdm(range(len(attributes.category)), desc="drawing products", unit="item", delay=2):
        # In the order of the vocabularies; the material's is that of the category.
        *positions, material = (values[item] for values in vars(attributes).values())
        category, colour, pattern, style, brand = (words[at] for words, at in zip(vocabularies, positions))
        department, materials, goes_with = CATEGORIES[category]
        model, named = "".join(rng.choice(SYLLABLES, size=3)).title(), rng.random(4) < NAMED_IN_TITLE
        words = [word for word, is_named in zip((style, colour, pattern, materials[material]), named) if is_named]
        description = f"{STYLES[style]}. Goes with {goes_with[0]}, {goes_with[1]} and {goes_with[2]}."
        values = {
            "title": " ".join([brand, model, *(word for word in words if word != "plain"), category]),
            "description": description if rng.random() >= WITHOUT_DESCRIPTION else None,
            "brand": brand,
            "categories": [department, category],
            "attributes": [brand, category, materials[material]],
        }
        picture = draw_product(category, colour, pattern, style, picture_rng)
        builder.append(f"sku{item:06d}", values, picture if rng.random() >= WITHOUT_PICTURE else None, "the shop")
    return builder.build()


def draw_interactions(attributes: Attributes, num_users: int, rng: np.random.Generator) -> Interactions:
    """Purchases of every user, one after the other; nobody buys an item twice."""
    num_items = len(attributes.category)
    names = list(CATEGORIES)
    after_last = np.diag(np.full(len(names), SAME_CATEGORY_AS_LAST, np.float32))
    for category, (_, _, goes_with) in enumerate(CATEGORIES.values()):
        after_last[category, [names.index(other) for other in goes_with]] = GOES_WITH_LAST

    sizes = {name: getattr(attributes, name).max() + 1 for name in LIKES}
    tastes = {name: rng.integers(size, size=(num_users, TASTES_A_USER)) for name, size in sizes.items()}
    popularity = (-ZIPF_EXPONENT * np.log(rng.permutation(num_items) + 1 + ZIPF_OFFSET)).astype(np.float32)
    popularity[rng.random(num_items) < NEW_ARRIVALS] -= NEW_ARRIVAL_PENALTY
    lengths = np.minimum(SHORTEST + rng.geometric(1 / (MEAN_LENGTH - SHORTEST + 1), size=num_users) - 1, LONGEST)

    purchases = np.zeros((num_users, LONGEST), np.int32)
    # Users whose likings of all items fill some megabytes at a time.
    users_at_once = max(1, 2**21 // num_items)
    for start in tqdm(range(0, num_users, users_at_once), desc="users", delay=2):
        users = np.arange(start, min(start + users_at_once, num_users))
        taste = np.zeros(num_users, np.int64)
        for step in range(lengths[users].max()):
            users = users[lengths[users] > step]
            changes = rng.random(len(users)) < CHANGE_OF_TASTE
            taste[users] = np.where(changes, rng.integers(TASTES_A_USER, size=len(users)), taste[users])
            likings = np.tile(popularity, (len(users), 1))
            for name, weight in LIKES.items():
                likings[tastes[name][users, taste[users], None] == getattr(attributes, name)] += weight
            if step > 0:
                last = purchases[users, step - 1]
                likings += after_last[attributes.category[last]][:, attributes.category]
                for name, weight in SAME_AS_LAST.items():
                    values = getattr(attributes, name)
                    likings[values[last, None] == values] += weight
                np.put_along_axis(likings, purchases[users, :step], -np.inf, axis=1)
            # The largest liking after adding Gumbel noise is a draw from their softmax.
            likings += rng.gumbel(size=likings.shape)
            purchases[users, step] = likings.argmax(axis=1)

    user, step = np.nonzero(np.arange(LONGEST) < lengths[:, None])
    return Interactions(
        user_ids=[f"user{user:06d}" for user in range(num_users)],
        users=user.astype(np.int32),
        items=purchases[user, step],
        times=step,
    )

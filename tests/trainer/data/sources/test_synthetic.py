"""The synthetic shop: reproducible, and with the structure that its purpose needs, measured against chance."""

import io

import numpy as np
import pytest
from PIL import Image

from mmesid.trainer.data.sources.pictures import BACKDROPS, COLOURS, SHAPES, draw_product
from mmesid.trainer.data.sources.synthetic import (
    CATEGORIES,
    STYLES,
    draw_attributes,
    draw_interactions,
    generate_catalogue,
)


NUM_USERS = 1500


@pytest.fixture(scope="module")
def attributes():
    return draw_attributes(400, np.random.default_rng(0))


@pytest.fixture(scope="module")
def purchases(attributes):
    return draw_interactions(attributes, NUM_USERS, np.random.default_rng(1))


def test_equal_seeds_give_equal_shops_and_more_users_the_same_items():
    first, again, other = (generate_catalogue(60, num_users, seed) for num_users, seed in ((40, 3), (40, 3), (50, 4)))
    assert first.catalogue == again.catalogue, "titles, texts and the bytes of the pictures"
    for name in ("users", "items", "times"):
        assert np.array_equal(getattr(first.interactions, name), getattr(again.interactions, name))
    assert first.catalogue.titles() != other.catalogue.titles()
    assert first.catalogue.images[0] != other.catalogue.images[0]
    assert first.interactions.items[:40].tolist() != other.interactions.items[:40].tolist()
    assert first.synthetic and other.catalogue == generate_catalogue(60, 5, 4).catalogue


def test_catalogue_is_complete_but_for_a_few_pictures():
    catalogue = generate_catalogue(num_items=120, num_users=1).catalogue
    assert len(set(catalogue.item_ids)) == len(catalogue) == 120
    assert all(any(category in title for category in CATEGORIES) for title in catalogue.titles())
    assert all(text.startswith(title) for text, title in zip(catalogue.texts(), catalogue.titles()))
    assert 0 < catalogue.images.count(None) < 12
    assert len({image for image in catalogue.images if image}) == 120 - catalogue.images.count(None)


def test_sequences_are_of_the_promised_lengths_without_repeats(purchases):
    lengths = np.bincount(purchases.users)
    assert len(lengths) == NUM_USERS and lengths.min() == 5 and lengths.max() <= 30
    assert 8 < lengths.mean() < 10
    bought = np.stack([purchases.users, purchases.items])
    assert len(np.unique(bought, axis=1).T) == len(purchases)
    assert (np.diff(purchases.times)[np.diff(purchases.users) == 0] == 1).all()


def consecutive(purchases) -> tuple[np.ndarray, np.ndarray]:
    same_user = np.diff(purchases.users) == 0
    return purchases.items[:-1][same_user], purchases.items[1:][same_user]


def against_chance(agrees, before: np.ndarray, after: np.ndarray) -> float:
    """How much more often than with `after` shuffled, which keeps what is popular and breaks who bought it."""
    shuffled = np.random.default_rng(0).permutation(after)
    return agrees(before, after).mean() / agrees(before, shuffled).mean()


def test_next_item_goes_with_the_last_one(attributes, purchases):
    names = list(CATEGORIES)
    goes_with = np.zeros((len(names), len(names)), bool)
    for name, (_, _, others) in CATEGORIES.items():
        goes_with[names.index(name), [names.index(other) for other in others]] = True
    assert goes_with.sum(axis=1).tolist() == [3] * len(names)

    def complements(before, after):
        return goes_with[attributes.category[before], attributes.category[after]]

    assert against_chance(complements, *consecutive(purchases)) > 2.5


def test_users_have_tastes_that_change(attributes, purchases):
    before, after = consecutive(purchases)
    for name, factor in (("colour", 1.8), ("style", 1.6), ("pattern", 1.08), ("brand", 1.15)):
        values = getattr(attributes, name)
        assert against_chance(lambda a, b, values=values: values[a] == values[b], before, after) > factor, name

    # The pattern is matched by taste alone, not by the last purchase: agreement that fades is taste that changes.
    def same_pattern(distance: int) -> float:
        first, later = purchases.items[:-distance], purchases.items[distance:]
        same_user = purchases.users[:-distance] == purchases.users[distance:]
        return (attributes.pattern[first] == attributes.pattern[later])[same_user].mean()

    assert same_pattern(1) > same_pattern(8)


def test_popularity_has_a_head_and_a_cold_tail(purchases):
    counts = np.sort(np.bincount(purchases.items, minlength=400))[::-1]
    assert counts[:40].sum() > 0.3 * counts.sum(), "a tenth of the items sells nearly a third"
    assert counts[200:].sum() < 0.2 * counts.sum()
    assert 4 <= (counts < 5).sum() < 60


def test_every_item_needs_room_for_the_longest_sequence():
    with pytest.raises(ValueError, match="needs 60 items and 1 user at least, got 59 and 10; raise"):
        generate_catalogue(num_items=59, num_users=10)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        return np.asarray(picture, dtype=np.float32)


def test_category_is_recognised_by_silhouette_and_colour_by_the_mean():
    assert list(SHAPES) == list(CATEGORIES) and list(BACKDROPS) == list(STYLES)
    rng = np.random.default_rng(0)
    categories = np.repeat(list(SHAPES), 6)
    colours = rng.choice(list(COLOURS), size=len(categories))
    silhouettes, nearest_colours = [], []
    for category, colour in zip(categories, colours):
        style = str(rng.choice(list(BACKDROPS)))
        pixels = decoded(draw_product(category, colour, "plain", style, rng))
        product = np.abs(pixels - BACKDROPS[style]).max(axis=2) > 70
        assert 0.08 < product.mean() < 0.8, f"a {category} that fills the picture, or none"
        silhouettes.append(product.ravel().astype(np.float32))
        shade = np.median(pixels[product], axis=0)
        nearest_colours.append(min(COLOURS, key=lambda name: np.abs(shade - COLOURS[name]).sum()))
    overlap = np.stack(silhouettes) @ np.stack(silhouettes).T
    similarity = overlap / (np.diag(overlap)[:, None] + np.diag(overlap) - overlap)
    np.fill_diagonal(similarity, 0)
    assert np.mean(categories[similarity.argmax(axis=1)] == categories) > 0.85, "chance is 1 in 21"
    assert np.mean(colours == nearest_colours) > 0.85, "chance is 1 in 10"


def test_patterns_differ_in_texture():
    plain, striped = (
        decoded(draw_product("cushion", "blue", pattern, "minimal", np.random.default_rng(5)))[20:44, 20:44, 0]
        for pattern in ("plain", "striped")
    )
    assert striped.mean(axis=1).std() > 3 * plain.mean(axis=1).std(), "stripes lie across the picture"

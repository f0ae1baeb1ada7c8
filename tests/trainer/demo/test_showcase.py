"""What the demo computes and what its HTML says; neither needs Gradio."""

import base64
import io
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mmesid.trainer.demo.cards import Cards
from mmesid.trainer.demo.showcase import Showcase

from ...modeling_mmesid.conftest import NUM_ITEMS, new_model
from .conftest import HARM


HISTORY = [5, 9, 5]


def test_all_sources_together_rank_as_the_model_does(showcase, monkeypatch):
    monkeypatch.setattr("mmesid.trainer.demo.showcase.ITEMS_PER_BLOCK", 7)
    best = showcase.model.recommend([HISTORY], top_k=8)
    recommended = showcase.recommend(HISTORY, showcase.sources, 8)
    assert [one.row for one in recommended] == best.items[0].tolist()
    scores = torch.tensor([one.score for one in recommended])
    assert torch.allclose(scores, best.scores[0], atol=1e-5)
    assert torch.allclose(scores, torch.tensor([sum(one.contributions.values()) for one in recommended]), atol=1e-5)


def test_a_source_that_is_left_out_adds_nothing(showcase):
    model = showcase.model
    every = torch.arange(1, NUM_ITEMS + 1)[None]
    parts = model.score_contributions(model.encode_histories([HISTORY]), every)
    kept = [name for name in showcase.sources if name != "text"]
    allowed = [row for row in range(1, NUM_ITEMS) if row not in HISTORY]
    expected = sum(parts[name] for name in kept)[0]
    recommended = showcase.recommend(HISTORY, kept, NUM_ITEMS)
    assert [one.row for one in recommended] == sorted(allowed, key=lambda row: -expected[row - 1])
    assert set(recommended[0].contributions) == set(kept)


def test_search_finds_all_words_in_titles_and_ids_frequent_ones_first(showcase):
    # The frequency of a row is its number.
    assert showcase.search("LAMP number", 3) == [39, 38, 37] == showcase.popular(3) == showcase.search("  ", 3)
    assert showcase.search("number i12", 5) == [12]
    assert showcase.rows_of("i3, i4\n i3") == [3, 4, 3]


def test_neighbours_share_leading_codes(showcase):
    codes, modality = showcase.codes["collaborative"], showcase.model.model.items.modalities["collaborative"]
    for row in (1, 7):
        expected = {}
        for other in set(range(1, NUM_ITEMS + 1)) - {row, 5}:
            pairs = zip(modality.codes[row].tolist(), modality.codes[other].tolist())
            expected[other] = next((level for level, (one, two) in enumerate(pairs) if one != two), 3)
        kin = showcase.kin(row, "collaborative", NUM_ITEMS)
        assert dict(kin) == {other: shared for other, shared in expected.items() if shared}
        assert kin == sorted(kin, key=lambda one: (-one[1], -one[0]))
    # Item 5 lacks the modality, and is like nothing.
    assert codes[5].tolist() == [-1, -1, -1] and showcase.kin(5, "collaborative", 9) == []


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda one: one.recommend([], ["id"], 3), "The history is empty"),
        (lambda one: one.recommend([1], [], 3), "No source is left"),
        (lambda one: one.recommend([1], ["smell"], 3), "There is no source 'smell'"),
        (lambda one: one.recommend(list(range(1, NUM_ITEMS)), ["id"], 3), "No item is left"),
        (lambda one: one.search("zebra", 3), "No item has 'zebra'"),
        (lambda one: one.rows_of(" , "), "There is no item id"),
        (lambda one: one.rows_of("i1 nowhere"), "'nowhere' is not in this model's catalogue"),
        (lambda one: one.require_item(NUM_ITEMS + 1), "There is no item in row 41"),
        (lambda one: one.require_item("<script>"), "There is no item in row <script>"),
        (lambda one: one.require_item(True), "There is no item in row True"),
    ],
)
def test_wrong_input_ends_in_a_sentence(showcase, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(showcase)


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_titles_and_ids_are_nothing_but_text(showcase):
    cards = Cards(showcase)
    pages = [
        cards.heading(HARM[0]),
        cards.items([1, 2, 3, 4], "add", HARM[0], ""),
        cards.ranking(showcase.recommend([1, 2, 3], showcase.sources, NUM_ITEMS), [1, 2, 3]),
        "".join(cards.kin(row, NUM_ITEMS) for row in range(1, len(HARM) + 1)),
        cards.sentence(HARM[1]),
    ]
    for page in pages:
        tags = Tags(page).tags
        assert not [tag for tag, _ in tags if tag == "script"]
        assert all(attributes["src"].startswith("data:image/jpeg;base64,") for tag, attributes in tags if tag == "img")
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert all(title in Tags(pages[1]).text for title in HARM)


def test_a_ranking_shows_bars_on_one_scale_and_the_kin_of_the_history(showcase):
    recommended = showcase.recommend(HISTORY, showcase.sources, 10)
    page = Tags(Cards(showcase).ranking(recommended, HISTORY))
    bars = [attributes["style"] for tag, attributes in page.tags if tag == "i" and "left" in attributes["style"]]
    widths = [float(style.split("width:")[1].split("%")[0]) for style in bars]
    values = [abs(value) for one in recommended for value in one.contributions.values()]
    assert len(widths) == 10 * len(showcase.sources)
    assert torch.allclose(torch.tensor(widths) / max(widths), torch.tensor(values) / max(values), atol=1e-3)
    modality, shared, row = showcase.nearest_of_history(recommended[0].row, HISTORY) or ("", 0, 0)
    if shared:
        assert f"{modality} code" in page.text and f"“Lamp number {row}” of the history" in page.text
    # The others say what of the history they are most like, by the similarity that is scored.
    kin, showcase.nearest_of_history = showcase.nearest_of_history, lambda row, history: None
    vectors = {"text": torch.eye(NUM_ITEMS + 1)}
    vectors["text"][recommended[0].row, HISTORY[1]] = 0.3
    earlier, showcase._vectors = showcase._vectors, vectors
    text = Tags(Cards(showcase).ranking(recommended[:2], HISTORY)).text
    showcase.nearest_of_history, showcase._vectors = kin, earlier
    assert text.count("is most like") == 1 and text.count("owes most of its score to") == 1
    assert f"is most like “{showcase.titles[HISTORY[1]]}” of the history by text" in text


def test_pictures_are_small_and_items_without_one_show_their_title(showcase):
    page = Tags(Cards(showcase).items([7, 8], "add", ""))
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        assert max(picture.size) == 160
    assert page.text.count("Lamp number 8") == 2 and page.text.count("Lamp number 7") == 1


def test_a_recommender_without_semantic_ids_says_so(showcase):
    plain = Showcase(new_model(modalities=[], embedding_dims=[], num_quantizers=0).eval(), showcase.processor)
    assert plain.sources == ["id"] and len(plain.recommend([1], ["id"], 5)) == 5
    assert "without semantic IDs" in Cards(plain).kin(1, 3)

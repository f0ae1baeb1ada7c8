import copy

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from mmesid.trainer.recommender.small_llama import train_tokenizer
from modeling_mmesid import MMESIDProcessor


IDS = ["b-7", "a-1", "c/3"]
TITLES = ["Lipstick, red", "Nail polish", "Soap"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TITLES, vocab_size=400)


@pytest.fixture
def processor(tokenizer):
    return MMESIDProcessor(tokenizer, IDS, TITLES)


def test_ids_to_rows_and_back(processor):
    assert processor([["a-1", "b-7"], ["c/3"]]) == [[2, 1], [3]]
    assert processor.convert_rows_to_item_ids(torch.tensor([[2, 1], [3, 3]])) == [["a-1", "b-7"], ["c/3", "c/3"]]
    assert processor.convert_rows_to_titles([3, 1]) == ["Soap", "Lipstick, red"]


@pytest.mark.parametrize(
    ("histories", "words"),
    [
        ([["a-1"], []], "History 1 is empty"),
        ([["a-1", "zzz"]], "'zzz' is not in this model's catalogue of 3 items, whose first is 'b-7'"),
        ([[["a-1"]]], "Item id .* is not in this model's catalogue"),
        (["a-1"], "History 0 is 'a-1'; give a list of item ids for each user"),
        ([1, 2], "History 0 is 1; give a list of item ids for each user"),
    ],
)
def test_bad_histories_are_named(processor, histories, words):
    with pytest.raises(ValueError, match=words):
        processor(histories)


def test_histories_come_from_any_table_and_integers_stand_for_the_ids_they_are_written_as(tokenizer):
    processor = MMESIDProcessor(tokenizer, np.array([7, 31]), np.array(["Soap", "Lamp"]))
    assert processor.item_ids == ["7", "31"] and processor.add_items(np.array(["A"]), ["Shirt"]) == [3]
    assert processor(np.array([["31", "7"]])) == processor([[31, 7]]) == processor([np.array([31, 7])]) == [[2, 1]]
    assert processor(history for history in [("A",)]) == [[3]]


def test_tensors_hold_the_latest_items_and_the_closing_tokens(tokenizer):
    processor = MMESIDProcessor(tokenizer, IDS, user_prompt="{items} next:", max_history=2)
    closing = processor.prompt_ids()[1]
    inputs = processor([["c/3"], IDS], return_tensors="pt")
    assert inputs["items"].tolist() == [[3, *[0] * (len(closing) + 1)], [2, 3, *[0] * len(closing)]]
    assert inputs["input_ids"].tolist() == [[0, *closing, 0], [0, 0, *closing]]
    assert inputs.to("cpu")["lengths"].tolist() == [len(closing) + 1, len(closing) + 2]
    for histories, kind, words in (([], "pt", "There is no history"), ([IDS], "np", "return_tensors is 'np'")):
        with pytest.raises(ValueError, match=words):
            processor(histories, return_tensors=kind)


def test_padding_row_has_no_id(processor):
    with pytest.raises(ValueError, match="Row 0 is outside 1..3"):
        processor.convert_rows_to_item_ids([0])


def test_repeated_id_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        MMESIDProcessor(tokenizer, ["x", "y", "x"])


def test_round_trip_through_the_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MMESIDProcessor)
    assert loaded.item_ids == IDS
    assert loaded.titles == TITLES
    assert loaded.prompt_ids() == processor.prompt_ids()


def test_prompt_is_the_chat_template_around_the_items(processor, tokenizer):
    prefix, suffix = processor.prompt_ids()
    assert tokenizer.decode(prefix) == (
        "<system>You are a helpful AI assistant for recommendations</system>"
        "<user>Given the user's purchase history, predict next possible item to be purchased. "
    )
    assert tokenizer.decode(suffix) == "</user><assistant>"


USER_TURN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
)
REFUSED = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize("first", [REFUSED, ""], ids=["refused", "dropped"])
def test_a_template_without_system_turn_says_it_in_the_user_s(tokenizer, first):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = first + USER_TURN + "{% endif %}{% endfor %}"
    prefix, suffix = MMESIDProcessor(
        tokenizer, IDS, system_prompt="Be brief.", user_prompt="Bought {items} next:"
    ).prompt_ids()
    assert tokenizer.decode(prefix) == "[INST] Be brief.\n\nBought "
    assert tokenizer.decode(suffix) == " next: [/INST]"


def test_tokenizer_without_chat_template_gets_plain_sentences(tokenizer):
    plain = train_tokenizer(TITLES, vocab_size=400)
    plain.chat_template = None
    prefix, suffix = MMESIDProcessor(plain, IDS, system_prompt="S", user_prompt="Bought {items} next:").prompt_ids()
    assert plain.decode(prefix) == "<s>S\nBought "
    assert plain.decode(suffix) == " next:\n"


def test_items_alone_are_no_prompt(tokenizer):
    assert MMESIDProcessor(tokenizer, IDS, user_prompt="{items}").prompt_ids() == ([], [])


def test_prompt_needs_a_place_for_items(tokenizer):
    with pytest.raises(ValueError, match="exactly once"):
        MMESIDProcessor(tokenizer, IDS, user_prompt="Recommend something")

"""The stage that shows a recommender: where its pictures come from, and what it says where something is missing. The
page itself is tested in `tests/trainer/demo`."""

import importlib.util
import shutil

import pytest

from mmesid.trainer.stages import demo
from modeling_mmesid import MMESIDProcessor


def test_pictures_are_those_of_the_dataset_beside_the_recommender(tiny_run):
    processor = MMESIDProcessor.from_pretrained(tiny_run / "recommender")
    data = demo.items_of(str(tiny_run / "recommender"), None)
    picture = demo.pictures(data, processor)
    expected = data.items()[6]["image"]
    assert picture(7).tobytes() == expected.tobytes() and data.statistics["synthetic"]
    # An item that came after training has none.
    assert picture(data.num_items + 1) is None


def test_a_recommender_that_stands_alone_has_no_pictures(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "recommender", tmp_path / "recommender")
    processor = MMESIDProcessor.from_pretrained(tmp_path / "recommender")
    assert demo.items_of(str(tmp_path / "recommender"), None) is None
    assert demo.pictures(None, processor)(1) is None


def test_pictures_of_other_items_are_refused(tiny_run):
    data = demo.items_of(str(tiny_run / "recommender"), str(tiny_run / "prepared"))
    processor = MMESIDProcessor.from_pretrained(tiny_run / "recommender")
    processor.item_ids = ["x", *processor.item_ids[1:]]
    with pytest.raises(ValueError, match="holds other items than the recommender; give the --prepared_dir"):
        demo.pictures(data, processor)


def test_without_gradio_the_extra_is_named(tiny_run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    with pytest.raises(ValueError, match=r"mmesid demo needs Gradio.*pip install 'mmesid\[demo\]'"):
        demo.main(["--model", str(tiny_run / "recommender")])

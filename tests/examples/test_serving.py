"""An exported user encoder and an index recommend as the model does; the web app around them answers."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from mmesid.trainer.recommender.small_llama import train_tokenizer
from mmesid.trainer.stages import index
from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor, SASRecConfig

from ..modeling_mmesid.conftest import HISTORIES, NUM_ITEMS, new_model


SERVING = Path(__file__).parents[2] / "examples" / "serving"


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Path:
    """A directory with `recommender`, `index` and `users.pt2`, of a model with all scorers."""
    root = tmp_path_factory.mktemp("serving")
    sasrec = SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, max_history=10)
    model = new_model(
        similarity_weights={"text": 0.5}, similarity_dim=4, sasrec_config=sasrec.to_dict(), sasrec_weight=0.3
    )
    model.remove_items([NUM_ITEMS])
    model.save_pretrained(root / "recommender")
    ids = [f"i{row}" for row in range(1, NUM_ITEMS + 1)]
    MMESIDProcessor(train_tokenizer(["lamp"], vocab_size=300), ids, ids).save_pretrained(root / "recommender")
    index.main(["--model_dir", str(root / "recommender"), "--output_dir", str(root / "index"), "--use_cpu", "true"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        export_users = importlib.import_module("export_users")
        export_users.main(["--model_dir", str(root / "recommender"), "--output_file", str(root / "users.pt2")])
    return root


@pytest.fixture(scope="module")
def retrieval(serving):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        yield importlib.import_module("retrieval").Retrieval(serving / "index", serving / "users.pt2")


def test_the_exported_encoder_and_the_index_recommend_as_the_model(serving, retrieval):
    model = MMESIDForSequentialRecommendation.from_pretrained(serving / "recommender").eval()
    longer_than_is_read = list(range(1, 38))
    for history in ([row for row in one if row != NUM_ITEMS] for one in [*HISTORIES, longer_than_is_read]):
        count = min(8, NUM_ITEMS - 1 - len(set(history)))
        best = model.recommend([history], top_k=count)
        found = retrieval.recommend([f"i{row}" for row in history], count)
        assert [item["row"] for item in found] == best.items[0].tolist()
        assert torch.allclose(torch.tensor([item["score"] for item in found]), best.scores[0], atol=1e-5)


@pytest.mark.parametrize(
    ("history", "sentence"),
    [([], "history is empty"), (["i1", "i99"], "'i99' is not in"), (["i40"], "'i40' is not in")],
)
def test_histories_that_cannot_be_read_end_in_a_sentence(retrieval, history, sentence):
    with pytest.raises(ValueError, match=sentence):
        retrieval.recommend(history)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "httpx")),
    reason="THE WEB APP IS NOT TESTED: fastapi or httpx is not installed here",
)
def test_the_web_app_answers(serving, retrieval, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setenv("INDEX_DIR", str(serving / "index"))
    monkeypatch.setenv("USERS_FILE", str(serving / "users.pt2"))
    client = TestClient(importlib.import_module("app").create())
    answer = client.post("/recommend", json={"history": ["i3", "i9"], "count": 3})
    assert answer.status_code == 200 and answer.json() == retrieval.recommend(["i3", "i9"], 3)
    answer = client.post("/recommend", json={"history": ["i99"]})
    assert answer.status_code == 422 and "'i99' is not in the index" in answer.json()["detail"]
    assert client.post("/recommend", json={"history": ["i3"], "count": 0}).status_code == 422

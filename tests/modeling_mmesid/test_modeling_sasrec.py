import pytest
import torch
from transformers import AutoModel, set_seed

from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation


@pytest.fixture
def model():
    set_seed(0)
    config = SASRecConfig(num_items=30, hidden_size=16, intermediate_size=32, max_history=8)
    return SASRecForSequentialRecommendation(config).eval()


def test_states_are_causal_and_padding_is_inert(model):
    with torch.no_grad():
        full = model.model(torch.tensor([[3, 4, 5, 6]]))
        padded = model.model(torch.tensor([[3, 4, 0, 0]]))
    torch.testing.assert_close(full[:, :2], padded[:, :2])


def test_one_position_alone_has_the_state_that_it_has_among_all(model):
    items, last = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]]), torch.tensor([3, 1, 0])
    with torch.no_grad():
        torch.testing.assert_close(model.model(items, last), model.model(items)[torch.arange(3), last])


def test_loss_is_the_cross_entropy_over_real_items(model):
    items, labels = torch.tensor([[3, 4, 5], [7, 0, 0]]), torch.tensor([[4, 5, 9], [8, -100, -100]])
    states = model.model(items)[labels != -100]
    expected = torch.nn.functional.cross_entropy(states @ model.item_table()[1:].T, labels[labels != -100] - 1)
    assert model(items=items, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_user_is_read_behind_the_last_item(model):
    with torch.no_grad():
        users = model(items=torch.tensor([[3, 4, 5], [7, 0, 0]])).user_embeddings
        torch.testing.assert_close(users[1], model(items=torch.tensor([[7]])).user_embeddings[0])


def test_padding_vector_stays_zero_through_training(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(items=torch.tensor([[3, 4], [7, 0]]), labels=torch.tensor([[4, 5], [8, -100]])).loss.backward()
    optimizer.step()
    assert model.item_table()[0].abs().max() == 0


def test_round_trip_and_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    histories = [[1, 2, 3], list(range(1, 20))]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, SASRecForSequentialRecommendation)
    assert torch.equal(loaded.recommend(histories).scores, model.recommend(histories).scores)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}


def test_heads_must_divide_the_width():
    with pytest.raises(Exception, match="hidden_size 10 is not a multiple of num_attention_heads 4"):
        SASRecConfig(hidden_size=10, num_attention_heads=4)

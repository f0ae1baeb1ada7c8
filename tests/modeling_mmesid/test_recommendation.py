import pytest
import torch

from modeling_mmesid.recommendation import mask_histories, score_items, target_ranks, top_items

from .conftest import new_model


def test_scores_are_inner_products_and_padding_never_wins():
    users, table = torch.tensor([[1.0, -2.0]]), torch.tensor([[9.0, -9.0], [1.0, 0.0], [0.0, 1.0]])
    assert score_items(users, table).tolist() == [[-torch.inf, 1.0, -2.0]]


def test_ties_count_against_the_target():
    scores = torch.tensor([[-torch.inf, 2.0, 2.0, 1.0, 3.0]])
    assert target_ranks(scores, torch.tensor([1])).tolist() == [3]
    assert target_ranks(scores, torch.tensor([4])).tolist() == [1]
    assert target_ranks(scores, torch.tensor([3])).tolist() == [4]


def test_nan_counts_against_the_target():
    scores = torch.tensor([[-torch.inf, torch.nan, 1.0, 2.0]])
    assert target_ranks(scores, torch.tensor([1])).item() >= 3
    assert target_ranks(torch.full((1, 4), torch.nan), torch.tensor([2])).item() >= 3


def test_ranks_agree_with_sorting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 101, generator=generator)
    scores[:, 0] = -torch.inf
    targets = torch.randint(1, 101, (20,), generator=generator)
    order = scores.argsort(descending=True)
    expected = (order == targets[:, None]).int().argmax(-1) + 1
    assert target_ranks(scores, targets).tolist() == expected.tolist()


def test_history_is_masked_and_padding_in_it_is_harmless():
    scores = mask_histories(torch.arange(5.0).repeat(2, 1), torch.tensor([[4, 2], [3, 0]]))
    assert scores[0].tolist() == [0.0, 1.0, -torch.inf, 3.0, -torch.inf]
    assert scores[1].tolist() == [-torch.inf, 1.0, 2.0, -torch.inf, 4.0]


def test_recommending_keeps_the_best_alone_and_no_gradients():
    output = new_model().recommend([[1, 2], [3], [4, 5]], top_k=4, batch_size=2, return_contributions=True)
    for tensor in (output.items, output.scores, *output.contributions.values()):
        assert tensor.shape == (3, 4)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a part that keeps the whole alive"
        assert not tensor.requires_grad


@pytest.mark.parametrize("num_items", [640, 1499, 2000])
def test_best_items_are_those_of_a_sort(num_items):
    """Also behind the last whole block of scores, and where most scores are minus infinity."""
    generator = torch.Generator().manual_seed(num_items)
    scores = torch.randn(30, num_items + 1, generator=generator)
    scores[:10, :-12] = -torch.inf
    best_scores, rows = top_items(scores, 10)
    order = scores.sort(descending=True)
    assert torch.equal(best_scores, order.values[:, :10])
    assert torch.equal(rows, order.indices[:, :10])


def test_histories_of_all_lengths_are_answered_in_the_order_given():
    model = new_model()
    histories = [[1, 2, 3, 4, 5], [3], [2, 4], [1, 5, 2, 3], [4]]
    together = model.recommend(histories, top_k=3, batch_size=2, return_contributions=True)
    for index, history in enumerate(histories):
        alone = model.recommend([history], top_k=3, return_contributions=True)
        assert torch.equal(together.items[index], alone.items[0])
        torch.testing.assert_close(together.scores[index], alone.scores[0])
        for source, contribution in alone.contributions.items():
            torch.testing.assert_close(together.contributions[source][index], contribution[0])

import torch

from modeling_mmesid.recommendation import mask_histories, score_items, target_ranks

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

"""The search for codes against stress computed by hand, and the loss that trains code vectors for them."""

import itertools

import numpy as np
import pytest
import torch

from modeling_mmesid.code_search import nearest_anchors, search_codes
from modeling_mmesid.loss_mmrqvae import stress_loss


FOCUS = 0.7
OFFSET = 0.4


def problem(levels: int = 3, items: int = 9, anchors: int = 30, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embeddings": torch.randn(items, 5, generator=generator),
        "start": torch.randint(6, (items, levels), generator=generator),
        "anchors": torch.randn(anchors, 5, generator=generator),
        "anchor_vectors": torch.randn(anchors, 4, generator=generator),
        "codebooks": torch.randn(levels, 6, 4, generator=generator) * 0.7,
    }


def stress_by_hand(given: dict, item: int, codes) -> float:
    """The definition, in float64 and without matrix products."""
    embedding, anchors, vectors, codebooks = (
        given[name].double().numpy() for name in ("embeddings", "anchors", "anchor_vectors", "codebooks")
    )
    before = ((embedding[item] - anchors) ** 2).sum(1)
    quantized = sum(codebooks[level][code] for level, code in enumerate(codes))
    after = ((quantized - vectors) ** 2).sum(1)
    return _stress(before, after)


def _stress(before: np.ndarray, after: np.ndarray) -> float:
    distances = np.sqrt(before)
    weights = np.exp(-FOCUS * np.maximum((distances - distances.mean()) / distances.std(), -3))
    weights /= weights.sum()
    variance = weights @ (before - weights @ before) ** 2
    return weights @ (after + OFFSET - before) ** 2 / variance


def search(given: dict, sweeps: int):
    return search_codes(**given, offset=torch.tensor(OFFSET), focus=FOCUS, sweeps=sweeps)


def test_stress_of_the_result_is_that_of_its_definition():
    given = problem()
    codes, stress = search(given, sweeps=1)
    for item, chosen in enumerate(codes.tolist()):
        assert stress[item].item() == pytest.approx(stress_by_hand(given, item, chosen), rel=1e-4)


def test_every_sweep_lowers_the_stress_until_no_single_code_is_better():
    given = problem()
    at_start = [stress_by_hand(given, item, codes) for item, codes in enumerate(given["start"].tolist())]
    runs = [search(given, sweeps)[1].numpy() for sweeps in (1, 2, 20)]
    for before, after in itertools.pairwise([np.array(at_start), *runs]):
        assert (after <= before + 1e-4).all()
    codes, stress = search(given, sweeps=20)
    for item, chosen in enumerate(codes.tolist()):
        for level, code in itertools.product(range(3), range(6)):
            other = [*chosen[:level], code, *chosen[level + 1 :]]
            assert stress_by_hand(given, item, other) >= stress[item].item() - 1e-4


def test_one_level_is_searched_exhaustively():
    given = problem(levels=1)
    codes, _ = search(given, sweeps=1)
    for item, (chosen,) in enumerate(codes.tolist()):
        assert chosen == np.argmin([stress_by_hand(given, item, [code]) for code in range(6)])


def test_blocks_do_not_change_the_codes(monkeypatch):
    given = problem(items=50)
    whole = search(given, sweeps=2)
    nearest = nearest_anchors(given["embeddings"], given["anchors"], 3)
    monkeypatch.setattr("modeling_mmesid.code_search.BLOCK_NUMBERS", 7 * 30)
    parts = search(given, sweeps=2)
    assert torch.equal(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])
    assert torch.equal(nearest_anchors(given["embeddings"], given["anchors"], 3), nearest)
    assert nearest.tolist() == torch.cdist(given["embeddings"], given["anchors"]).argsort(1)[:, :3].tolist()


def test_an_item_does_not_measure_itself_among_the_anchors():
    given = problem()
    alone = search(given, sweeps=2)
    for name, own in (("anchors", given["embeddings"]), ("anchor_vectors", torch.full((9, 4), 1e3))):
        given[name] = torch.cat([given[name], own])
    # Each item meets itself and eight others; those others are far away, and the same for both runs below.
    both = search(given, sweeps=2)
    given["anchor_vectors"][30] = -1e3
    again = search(given, sweeps=2)
    assert torch.equal(again[0][0], both[0][0])
    assert not torch.equal(both[1], alone[1])


def test_stress_loss_is_the_mean_over_items_of_its_definition():
    given = problem(items=12)
    embeddings, quantized = given["embeddings"], given["anchor_vectors"][:12]
    expected = []
    for item in range(12):
        others = np.arange(12) != item
        before = ((embeddings[item] - embeddings) ** 2).sum(1).double().numpy()[others]
        after = ((quantized[item] - quantized) ** 2).sum(1).double().numpy()[others]
        expected.append(_stress(before, after))
    loss = stress_loss(embeddings, quantized, torch.tensor(OFFSET), FOCUS)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_distances_that_are_kept_up_to_the_offset_have_no_stress():
    embeddings = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    assert stress_loss(embeddings, embeddings @ rotation + 3, torch.tensor(0.0)) < 1e-8
    # A dimension of their own for every item takes the same amount from all squared distances, or gives it.
    apart = torch.cat([embeddings, torch.eye(20)], 1)
    assert stress_loss(apart, embeddings, torch.tensor(2.0)) < 1e-8
    assert stress_loss(apart, embeddings, torch.tensor(0.0)) > 1e-2
    # Too few to have distances that vary.
    assert stress_loss(embeddings[:2], embeddings[:2] * 2, torch.tensor(0.0)) == 0

"""IDs are unique after the resolution, and only those move that must."""

import itertools

import pytest
import torch

from mmesid.trainer.quantizer.collisions import resolve_collisions, shared


def test_shared_finds_all_but_the_first_of_equal_rows():
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [3, 3], [1, 2], [0, 0]])
    assert shared(codes).tolist() == [False, False, True, False, True, True]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_items_move_to_the_nearest_free_id(levels):
    generator = torch.Generator().manual_seed(levels)
    vectors = torch.randn(levels, 4, 3, generator=generator)
    latents = vectors[:, 1].sum(0) + 0.01 * torch.randn(4, 3, generator=generator)
    codes = torch.ones(4, levels, dtype=torch.int16)
    before = codes.clone()
    moved = shared(codes).nonzero()[:, 0]
    resolve_collisions(codes, moved, latents[moved], vectors)
    assert torch.equal(codes[0], before[0])
    assert len(set(map(tuple, codes.tolist()))) == 4
    # Four items and four codes: the last level alone suffices, each item takes the nearest of those that are left.
    assert torch.equal(codes[:, :-1], before[:, :-1])
    free = {0, 2, 3}
    for row in moved.tolist():
        residual = latents[row] - vectors[:-1, 1].sum(0)
        expected = min(free, key=lambda code, residual=residual: (residual - vectors[-1, code]).norm().item())
        assert codes[row, -1] == expected
        free.remove(expected)


def test_the_level_before_changes_when_the_last_one_is_full_and_no_id_left_is_refused():
    vectors = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    codes, latents = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(5, 3)
    resolve_collisions(codes, torch.tensor([1, 2, 3]), latents[:3], vectors)
    assert set(map(tuple, codes.tolist())) == set(itertools.product(range(2), range(2)))
    with pytest.raises(ValueError, match="row 4.*codebook_size"):
        resolve_collisions(torch.cat([codes, codes[:1]]), torch.tensor([4]), latents[:1], vectors)

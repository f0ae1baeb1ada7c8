"""Spectrum of a table against tables whose singular values are known, and against a decomposition by torch."""

import numpy as np
import pytest
import torch

from mmesid.trainer.metrics.collapse.collapse import collapse_metrics, singular_values

from .conftest import load


def test_a_table_of_known_spectrum():
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.normal(size=(50, 4)))
    right, _ = np.linalg.qr(random.normal(size=(4, 4)))
    table = left @ np.diag([8.0, 4.0, 4.0, 0.04]) @ right
    metric = load("collapse")
    metric.add_batch(embeddings=table[:30])
    metric.add_batch(embeddings=table[30:])
    values = metric.compute()
    assert values["information_abundance"] == pytest.approx(16.04 / 8)
    shares = [8 / 16.04, 4 / 16.04, 4 / 16.04, 0.04 / 16.04]
    assert values["effective_rank"] == pytest.approx(np.prod([share**-share for share in shares]))
    # 0.04 is half a percent of 8.
    assert values["collapsed_dimensions"] == 0.25


def test_singular_values_are_those_of_the_decomposition():
    table = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(singular_values(table.numpy()), torch.linalg.svdvals(table).numpy(), rtol=1e-9)


def test_a_line_has_one_dimension_and_nothing_has_none():
    line = np.outer(np.arange(1.0, 6.0), np.ones(10))
    values = collapse_metrics(singular_values(line))
    assert values["information_abundance"] == pytest.approx(1, abs=1e-5)
    assert values["collapsed_dimensions"] == 0.9
    with pytest.raises(ValueError, match="All embeddings are zero"):
        collapse_metrics(singular_values(np.zeros((5, 3))))

"""k-means against the properties that define a solution."""

import pytest
import torch

from mmesid.trainer.quantizer.kmeans import kmeans, nearest


def test_centroids_are_the_means_of_well_separated_groups():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(5, 1, 3, generator=generator) * 100 + torch.randn(5, 40, 3, generator=generator)
    centroids = kmeans(groups.flatten(0, 1), 5, torch.Generator().manual_seed(1))
    found = torch.cdist(groups.mean(1), centroids).min(1)
    assert sorted(found.indices.tolist()) == [0, 1, 2, 3, 4]
    assert found.values.max() < 1e-3


def test_every_cluster_has_points_even_if_most_points_coincide():
    points = torch.cat([torch.zeros(100, 2), torch.randn(12, 2, generator=torch.Generator().manual_seed(0))])
    centroids = kmeans(points, 8, torch.Generator().manual_seed(0))
    assert len(nearest(points, centroids)[0].unique()) == 8


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ValueError, match="3 points for 4 clusters"):
        kmeans(torch.zeros(3, 2), 4, torch.Generator())

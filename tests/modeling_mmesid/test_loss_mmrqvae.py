"""The quantizer's losses against naive float64 computations."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mmesid.loss_mmrqvae import distance_correlation_loss, info_nce, mmd


def squared_distances(points: np.ndarray) -> np.ndarray:
    return np.square(points[:, None] - points[None]).sum(-1)


def naive_bandwidth(points: np.ndarray) -> float:
    return squared_distances(points).sum() / (len(points) * (len(points) - 1)) / 4


def naive_mmd(source: np.ndarray, target: np.ndarray, bandwidth: float) -> float:
    """The definition, with an explicit difference for every pair of points."""
    squared = squared_distances(np.concatenate([source, target]))
    kernel = sum(np.exp(-squared / (bandwidth * 2**power)) for power in range(5))
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_mmd_equals_the_definition(shift):
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(37, 12)) + shift, 1.5 * generator.normal(size=(23, 12)) + shift + 0.3
    expected = naive_mmd(source, target, naive_bandwidth(np.concatenate([source, target])))
    for block_size in (1024, 7):
        value = mmd(torch.tensor(source).float(), torch.tensor(target).float(), block_size=block_size)
        assert value.item() == pytest.approx(expected, abs=2e-6, rel=1e-4)


def test_mmd_gradient_equals_finite_differences_of_the_definition():
    generator = np.random.default_rng(1)
    source, target = generator.normal(size=(6, 3)), generator.normal(size=(5, 3)) + 1
    tensor = torch.tensor(source).float().requires_grad_()
    mmd(tensor, torch.tensor(target).float(), block_size=4).backward()
    # A constant to the gradient.
    bandwidth = naive_bandwidth(np.concatenate([source, target]))
    for row, column in [(0, 0), (3, 2), (5, 1)]:
        step = np.zeros_like(source)
        step[row, column] = 1e-5
        difference = (naive_mmd(source + step, target, bandwidth) - naive_mmd(source - step, target, bandwidth)) / 2e-5
        assert tensor.grad[row, column].item() == pytest.approx(difference, abs=1e-5, rel=1e-3)


def test_mmd_of_identical_sets_is_zero_in_any_order():
    points = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert mmd(points, points).abs() < 1e-6
    assert mmd(points, points.flip(0)).abs() < 1e-6
    assert mmd(points, points + 1) > 0.1


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor holds that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_mmd_holds_one_block_of_one_kernel_at_a_time():
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    source, target = torch.randn(512, 64, requires_grad=True), torch.randn(512, 64)
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = mmd(source, target, block_size=64)
        loss.backward()
    # The points are 2^16 numbers, and so is a block of a kernel, which is 2^20 whole; all differences would be 2^26.
    assert largest.numbers == 2**16
    # No kernel waits for the backward pass.
    assert sum(kept.values()) < 4 * 2**20


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_info_nce_equals_the_definition(temperature):
    generator = np.random.default_rng(2)
    anchor, other = generator.normal(size=(9, 5)), generator.normal(size=(9, 5))
    left, right = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (anchor, other))
    logits = left @ right.T / temperature
    rows = np.log(np.exp(logits).sum(1)) - logits.diagonal()
    columns = np.log(np.exp(logits).sum(0)) - logits.diagonal()
    value = info_nce(torch.tensor(anchor), torch.tensor(other), temperature)
    assert value.item() == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "items"), [(mmd, 4), (lambda *views: info_nce(*views, 0.1), 0), (distance_correlation_loss, 2)]
)
def test_too_few_items_give_zero_with_zero_gradients(loss, items):
    points = torch.randn(items, 3, requires_grad=True)
    value = loss(torch.zeros(0 if loss is mmd else items, 3), points)
    value.backward()
    assert value == 0 and points.grad.shape == (items, 3) and points.grad.abs().sum() == 0


def test_distance_correlation_without_focus_equals_the_mean_correlation_of_rows():
    generator = np.random.default_rng(3)
    embeddings, quantized = generator.normal(size=(12, 6)), generator.normal(size=(12, 4))
    before, after = (np.linalg.norm(points[:, None] - points[None], axis=-1) for points in (embeddings, quantized))
    expected = np.mean(
        [np.corrcoef(np.delete(before[row], row), np.delete(after[row], row))[0, 1] for row in range(12)]
    )
    value = distance_correlation_loss(torch.tensor(embeddings), torch.tensor(quantized), focus=0.0)
    assert value.item() == pytest.approx(1 - expected, abs=1e-3)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_distance_correlation_is_zero_for_a_scaled_rotation_and_larger_for_noise(focus):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    assert distance_correlation_loss(points, 7 * points @ rotation + 3, focus) < 1e-3
    noise = torch.randn(40, 5, generator=generator)
    assert distance_correlation_loss(points, points + noise, focus) > 0.05


def test_focus_weighs_near_items_more():
    points = torch.cat([torch.arange(10.0), torch.tensor([30.0, 40.0])])[:, None]
    near_spoilt, far_spoilt = points.clone(), points.clone()
    near_spoilt[:4] = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    far_spoilt[-2:] = torch.tensor([[40.0], [30.0]])
    ratio = [
        distance_correlation_loss(points, near_spoilt, focus) / distance_correlation_loss(points, far_spoilt, focus)
        for focus in (0.0, 2.0)
    ]
    assert ratio[1] > ratio[0]


def test_distance_correlation_of_items_that_share_all_codes_has_finite_gradients():
    quantized = torch.ones(6, 3, requires_grad=True)
    distance_correlation_loss(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), quantized).backward()
    assert quantized.grad.isfinite().all()

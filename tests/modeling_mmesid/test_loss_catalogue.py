import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mmesid import loss_catalogue
from modeling_mmesid.loss_catalogue import (
    catalogue_cross_entropy,
    fused_cross_entropy,
    fused_kernel,
    sampled_cross_entropy,
)

from ..processes import run_in_two


def inputs(users=37, items=211, hidden=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    user_embeddings = torch.randn(users, hidden, generator=generator, dtype=dtype).requires_grad_()
    table = torch.randn(items + 1, hidden, generator=generator, dtype=dtype).requires_grad_()
    return user_embeddings, table, torch.randint(1, items + 1, (users,), generator=generator)


# One tile, tiles of users, and tiles that cut the catalogue as well.
@pytest.mark.parametrize("logits_per_tile", [2**22, 211 * 130, 3000, 200])
def test_loss_and_gradients_equal_the_plain_cross_entropy(logits_per_tile):
    users, table, targets = inputs(dtype=torch.float32)
    expected = torch.nn.functional.cross_entropy((users.double() @ table[1:].double().T), targets - 1)
    expected_gradients = torch.autograd.grad(expected, (users, table))

    loss = catalogue_cross_entropy(users, table, targets, logits_per_tile)
    gradients = torch.autograd.grad(3.0 * loss, (users, table))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, 3.0 * wanted, rtol=1e-4, atol=1e-5)


def test_padding_row_takes_no_part():
    users, table, targets = inputs(dtype=torch.float32)
    changed = table.detach().clone()
    changed[0] = 1e4
    assert catalogue_cross_entropy(users, table, targets) == catalogue_cross_entropy(users, changed, targets)
    catalogue_cross_entropy(users, table, targets).backward()
    assert table.grad[0].abs().max() == 0


def test_no_targets_give_zero_loss_and_zero_gradients():
    _, table, _ = inputs(dtype=torch.float32)
    loss = catalogue_cross_entropy(table.new_zeros(0, 16, requires_grad=True), table, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert table.grad.abs().max() == 0


def test_bf16_autocast_stays_near_the_exact_loss():
    users, table, targets = inputs(dtype=torch.float32)
    exact = catalogue_cross_entropy(users, table, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = catalogue_cross_entropy(users, table, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert table.grad.dtype == torch.float32


def test_extreme_logits_do_not_overflow():
    users, table, targets = inputs(dtype=torch.float32)
    loss = catalogue_cross_entropy(users * 1e3, table, targets, logits_per_tile=300)
    assert torch.isfinite(loss)


def test_sampled_loss_tends_to_the_whole_catalogue_s():
    torch.manual_seed(0)
    hidden, table = torch.randn(6, 8), torch.randn(201, 8)
    targets = torch.randint(1, 201, (6,))
    weights = torch.rand(200) + 0.1
    probabilities = weights / weights.sum()
    whole = catalogue_cross_entropy(hidden, table, targets)
    errors = []
    for count in (100, 100_000):
        drawn = torch.multinomial(probabilities, count, replacement=True) + 1
        log_counts = torch.log(count * probabilities[drawn - 1])
        loss = sampled_cross_entropy(
            hidden, table[targets], table[drawn], log_counts, targets[:, None] == drawn[None, :]
        )
        errors.append(abs(loss - whole))
    assert errors[1] < 0.01 < errors[0]


def test_sampled_loss_of_every_item_once_is_exact_and_has_its_gradients():
    torch.manual_seed(0)
    hidden, table = torch.randn(6, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)
    targets, everything = torch.tensor([1, 5, 5, 40, 17, 2]), torch.arange(1, 41)
    arguments = table[targets], table[everything], torch.zeros(40), targets[:, None] == everything[None, :]
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ table[1:].T, targets - 1), (hidden, table)
    )
    loss = sampled_cross_entropy(hidden, *arguments)
    assert loss.item() == pytest.approx(catalogue_cross_entropy(hidden, table, targets).item(), abs=1e-6)
    for gradient, wanted in zip(torch.autograd.grad(loss, (hidden, table)), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


def test_logits_are_never_held_whole_forward_or_backward():
    users, table, targets = inputs(users=300, items=5000, hidden=8, dtype=torch.float32)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
            return output

    with Largest() as largest:
        catalogue_cross_entropy(users, table, targets, logits_per_tile=50_000).backward()
    assert table.numel() < largest.elements <= 50_000 < len(users) * 5000


@pytest.mark.parametrize(
    ("installed", "where", "expected"),
    [
        ("both", ("cuda", torch.bfloat16, 512, 4096, 12_000), "cut-cross-entropy"),
        ("both", ("cuda", torch.float16, 512, 256, 1_000_000), "cut-cross-entropy"),
        # Its backward pass takes half precision alone.
        ("both", ("cuda", torch.float32, 512, 4096, 12_000), "liger-kernel"),
        ("liger", ("cuda", torch.bfloat16, 512, 4096, 12_000), "liger-kernel"),
        # One row of logits at a time, for each of which the whole table would be read.
        ("liger", ("cuda", torch.bfloat16, 512, 256, 1_000_000), None),
        ("both", ("cuda", torch.bfloat16, 0, 4096, 12_000), None),
        ("both", ("cpu", torch.bfloat16, 512, 4096, 12_000), None),
        ("none", ("cuda", torch.bfloat16, 512, 4096, 12_000), None),
    ],
)
def test_which_fused_kernel_serves(installed, where, expected, monkeypatch):
    for name, has in (
        ("linear_cross_entropy", installed == "both"),
        ("liger_fused_linear_cross_entropy", installed in ("both", "liger")),
    ):
        monkeypatch.setattr(loss_catalogue, name, torch.nn.functional.cross_entropy if has else None)
    assert fused_kernel(*where) == expected


def test_cut_cross_entropy_means_the_same_loss(monkeypatch):
    """Its reference implementation, which needs no GPU, with the arguments that its kernels get."""
    kernels = pytest.importorskip("cut_cross_entropy", reason="pip install 'mmesid[kernels]'")
    reference = functools.partial(kernels.linear_cross_entropy, impl="torch_compile")
    monkeypatch.setattr(loss_catalogue, "linear_cross_entropy", reference)
    users, table, targets = inputs(dtype=torch.float32)
    expected = 3.0 * catalogue_cross_entropy(users, table, targets)
    # Uncompiled: the same operations, without half a minute of a compiler.
    with torch.compiler.set_stance("force_eager"):
        loss = 3.0 * fused_cross_entropy("cut-cross-entropy", users, table, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, (users, table))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (users, table)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)
    assert (gradients[1][0] == 0).all()


INTERPRETED = """
import importlib.util, sys, torch

spec = importlib.util.spec_from_file_location("loss_catalogue", sys.argv[1])
loss_catalogue = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loss_catalogue)
torch.manual_seed(0)
users, table = torch.randn(37, 16, requires_grad=True), torch.randn(212, 16, requires_grad=True)
targets = torch.randint(1, 212, (37,))
results = []
for loss in (
    loss_catalogue.catalogue_cross_entropy(users, table, targets),
    loss_catalogue.fused_cross_entropy("liger-kernel", users, table, targets),
):
    results.append((loss, *torch.autograd.grad(3.0 * loss, (users, table))))
for found, expected in zip(*results):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
assert (results[1][2][0] == 0).all()
"""


def test_liger_kernel_means_the_same_loss():
    """Its own kernels, run by Triton's interpreter, which needs no GPU but has to be chosen before they are loaded."""
    pytest.importorskip("liger_kernel", reason="pip install 'mmesid[kernels]'")
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, loss_catalogue.__file__],
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("kernel", "package"), [("cut-cross-entropy", "cut_cross_entropy"), ("liger-kernel", "liger_kernel")]
)
def test_fused_kernels_agree_with_the_tiles(kernel, package):
    pytest.importorskip(package, reason="pip install 'mmesid[kernels]'")
    hidden, table, targets = (
        tensor.cuda() for tensor in inputs(users=256, items=1000, hidden=64, dtype=torch.float32)
    )
    exact = catalogue_cross_entropy(hidden, table, targets)
    fused = fused_cross_entropy(kernel, hidden.bfloat16(), table.bfloat16(), targets)
    assert fused.item() == pytest.approx(exact.item(), rel=1e-2)
    for gradient, wanted in zip(
        torch.autograd.grad(fused, (hidden, table)), torch.autograd.grad(exact, (hidden, table)), strict=True
    ):
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


def test_no_gradient_is_computed_where_gradients_are_off(monkeypatch):
    """Although a Parameter says that it needs one, as SASRec's table does in an evaluation."""
    made = []
    monkeypatch.setattr(torch, "zeros_like", lambda tensor, **kwargs: made.append(tensor.shape))
    hidden, table = torch.randn(3, 4), torch.nn.Parameter(torch.randn(6, 4))
    with torch.no_grad():
        loss = catalogue_cross_entropy(hidden, table, torch.tensor([1, 5, 2]))
    assert not made and not loss.requires_grad
    expected = torch.nn.functional.cross_entropy(hidden @ table[1:].T, torch.tensor([0, 4, 1]))
    torch.testing.assert_close(loss, expected.detach())


SHARDED = """
import torch
from torch import distributed
from modeling_mmesid.loss_catalogue import catalogue_cross_entropy, sharded_cross_entropy
distributed.init_process_group("gloo")
rank = distributed.get_rank()
generator = torch.Generator().manual_seed(0)
table, users = torch.randn(38, 8, generator=generator), torch.randn(300, 8, generator=generator) * 3
targets = torch.randint(1, 38, (300,), generator=generator)
table.requires_grad_()
users.requires_grad_()
expected = catalogue_cross_entropy(users, table, targets)
(2 * expected).backward()
# Neither users nor rows are parted evenly.
mine, rows = (slice(0, 120), slice(120, 300))[rank], (slice(0, 23), slice(23, 38))[rank]
# All at once, blocks of users that hold whole shards, and tiles of both.
for logits_per_tile in (2**22, 3000, 60):
    hidden = users.detach()[mine].requires_grad_()
    shard = table.detach()[rows].requires_grad_()
    loss = sharded_cross_entropy(hidden, shard, targets[mine], rows.start, logits_per_tile=logits_per_tile)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(shard.grad, table.grad[rows])
    torch.testing.assert_close(hidden.grad / 2, users.grad[mine])
    with torch.no_grad():
        torch.testing.assert_close(sharded_cross_entropy(hidden, shard, targets[mine], rows.start), expected)
try:
    sharded_cross_entropy(hidden, shard[:0], targets[mine], rows.start)
except ValueError as error:
    assert "has no item" in str(error)
"""


def test_a_table_parted_among_processes_has_the_loss_and_gradients_of_the_whole():
    finished = run_in_two("-c", SHARDED)
    assert finished.returncode == 0, finished.stderr

"""Cross-entropy over the whole catalogue without ever holding all of its logits."""

import torch
from torch import distributed


# Optional, both for CUDA.
try:
    from cut_cross_entropy import linear_cross_entropy
except ImportError:
    linear_cross_entropy = None
try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:
    liger_fused_linear_cross_entropy = None


# Logits held at a time: 4M float32 values are 16 MiB, which stay in the last-level cache of a server CPU; larger tiles
# are slower there.
LOGITS_PER_TILE = 2**22
# With fewer rows than this a matrix product is bound by reading the table, so a larger catalogue is cut along its
# items instead.
MINIMUM_TILE_ROWS = 128
FLOATS_PER_CACHE_LINE = 16


def catalogue_cross_entropy(
    hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, logits_per_tile: int = LOGITS_PER_TILE
) -> torch.Tensor:
    r"""
    Mean of \\(-\log \mathrm{softmax}_{i=1..N}(\langle u, t_i \rangle)_{target}\\) over user representations `hidden`,
    `(targets, hidden)`, with item vectors `table`, `(items + 1, hidden)`, row 0 for padding, which takes no part, and
    rows `targets`, `(targets,)`, from 1 to N. A scalar in float32; zero, with zero gradients, if there is no target.

    The gradients are computed in the forward pass, tile by tile, while the probabilities are at hand: memory beyond
    the inputs and their gradients is one tile of logits, whatever the size of the catalogue or of the batch. On CUDA
    the kernels of `cut-cross-entropy` or `liger-kernel` do the same if they are installed, see [`fused_kernel`].
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, table = hidden.to(dtype), table.to(dtype)
    rows, width = hidden.shape
    kernel = fused_kernel(hidden.device.type, hidden.dtype, rows, width, num_items=len(table) - 1)
    if kernel is not None:
        return fused_cross_entropy(kernel, hidden, table, targets)
    # Inside `apply` a Parameter needs a gradient even where gradients are off.
    return _CatalogueCrossEntropy.apply(hidden, table, targets, 0, None, logits_per_tile, torch.is_grad_enabled())


def sharded_cross_entropy(
    hidden: torch.Tensor,
    shard: torch.Tensor,
    targets: torch.Tensor,
    first_row: int,
    group: "distributed.ProcessGroup | None" = None,
    logits_per_tile: int = LOGITS_PER_TILE,
) -> torch.Tensor:
    """
    [`catalogue_cross_entropy`] of a table whose rows are parted among processes, each of which has users of its own:
    each scores the users of all against its rows, and their log-sum-exp is reduced, exactly. No process holds the
    whole table or its gradient.

    Args:
        hidden (`torch.FloatTensor` of shape `(targets, hidden)`): This process's user representations; processes may
            have different numbers of them.
        shard (`torch.FloatTensor` of shape `(rows, hidden)`): This process's rows of the table, one at least.
        targets (`torch.LongTensor` of shape `(targets,)`): Rows of the whole table, from 1.
        first_row (`int`): Row of the whole table at which the shard begins; row 0, the padding, takes no part.
        group (`torch.distributed.ProcessGroup`, *optional*): The processes; all by default.
        logits_per_tile (`int`, *optional*, defaults to `2**22`): Logits that a process holds at a time.

    Returns:
        `torch.FloatTensor` of shape `()`: The mean over the targets of all processes, the same on each. Its gradient
        for `shard` is whole and not to be averaged. That for `hidden` is multiplied by the number of processes, for
        DDP and FSDP average over the processes what lies behind it.
    """
    if len(shard) <= (first_row == 0):
        raise ValueError("A shard of the table has no item; part the items among fewer processes.")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, shard = hidden.to(dtype), shard.to(dtype)
    group = distributed.group.WORLD if group is None else group
    hidden, targets = _rows_of_all(hidden, targets, group)
    gradient = torch.is_grad_enabled()
    return _CatalogueCrossEntropy.apply(hidden, shard, targets, first_row, group, logits_per_tile, gradient)


def fused_kernel(device_type: str, dtype: torch.dtype, rows: int, hidden_size: int, num_items: int) -> str | None:
    """
    Which of the installed fused kernels serves a loss of so many rows, or `None` for the tiles of this module.

    `cut-cross-entropy` ([Wijmans et al., 2024](https://arxiv.org/abs/2411.09009)) comes first: it writes no logits to
    memory at all, in half precision alone. `liger-kernel` holds `rows * hidden_size` logits, so a large catalogue
    leaves it a few rows at a time, each of which reads the whole table; it serves where a tile here has no more.
    """
    if device_type != "cuda" or rows == 0:
        return None
    if linear_cross_entropy is not None and dtype in (torch.bfloat16, torch.float16):
        return "cut-cross-entropy"
    if liger_fused_linear_cross_entropy is not None and rows * hidden_size >= MINIMUM_TILE_ROWS * num_items:
        return "liger-kernel"
    return None


def fused_cross_entropy(kernel: str, hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[`catalogue_cross_entropy`] by a fused kernel. To the kernels there is no padding: they get the table without
    it, and classes from 0."""
    if kernel == "cut-cross-entropy":
        return linear_cross_entropy(hidden, table[1:], targets - 1, filter_eps="auto").float()
    # In half precision the gradients of the chunks would be summed in it.
    return liger_fused_linear_cross_entropy(hidden, table[1:], targets - 1, accum_dtype=torch.float32).float()


def sampled_cross_entropy(
    hidden: torch.Tensor,
    target_vectors: torch.Tensor,
    candidate_vectors: torch.Tensor,
    candidate_log_counts: torch.Tensor,
    is_target: torch.Tensor,
) -> torch.Tensor:
    r"""
    Mean of \\(\log(e^{\langle u, t \rangle} + \sum_j e^{\langle u, c_j \rangle - \log n q_j}) - \langle u, t
    \rangle\\): the sum over the catalogue is estimated from n sampled candidates, each weighed against how often it is
    drawn (logQ correction; importance sampling of [Bengio and Senécal,
    2008](https://doi.org/10.1109/TNN.2007.912312)). It tends to [`catalogue_cross_entropy`] as n grows.

    `hidden` and `target_vectors` are `(targets, hidden)`, `candidate_vectors` `(candidates, hidden)`, repeated as
    drawn, `candidate_log_counts` `(candidates,)` log(n q_j), how often an item is expected among the draws, and
    `is_target` `(targets, candidates)` where a candidate is the target itself, which counts once and exactly. The
    result is a scalar in float32; zero if there is no target.
    """
    target_logits = (hidden * target_vectors).sum(-1, dtype=torch.float32)
    logits = (hidden @ candidate_vectors.T).float() - candidate_log_counts
    logits = logits.masked_fill(is_target, -torch.inf)
    losses = torch.logsumexp(torch.cat([target_logits[:, None], logits], dim=1), dim=1) - target_logits
    return losses.sum() / max(len(losses), 1)


def _rows_of_all(
    hidden: torch.Tensor, targets: torch.Tensor, group: "distributed.ProcessGroup"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Users and targets of all processes, one after the other."""
    counts = [torch.zeros((), dtype=torch.long, device=targets.device) for _ in range(group.size())]
    distributed.all_gather(counts, counts[0].new_tensor(len(targets)), group=group)
    sizes = torch.stack(counts).tolist()
    return _GatherRows.apply(hidden, sizes, group), _gather_rows(targets, sizes, group)


def _gather_rows(rows: torch.Tensor, sizes: list[int], group: "distributed.ProcessGroup") -> torch.Tensor:
    # Equal shapes: not every backend gathers others.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return _gather_rows(rows, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        # What each shard has to say of all users.
        distributed.all_reduce(gradient, group=ctx.group)
        own = gradient.split(ctx.sizes)[distributed.get_rank(ctx.group)]
        return own * ctx.group.size(), None, None


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, targets, first_row, group, logits_per_tile, with_gradient):
        # Row 0 of the whole table is padding.
        padding = int(first_row == 0)
        rows, num_items = hidden.shape[0], table.shape[0] - padding
        widest = max(logits_per_tile // MINIMUM_TILE_ROWS, 1)
        if widest > FLOATS_PER_CACHE_LINE:
            widest -= widest % FLOATS_PER_CACHE_LINE
        items_step = min(widest, num_items)
        # Processes reduce their shards, which may be of unlike sizes, block by block of the same users.
        rows_step = max(logits_per_tile // _whole_lines(items_step if group is None else widest), 1)
        items = table[padding:]
        tiles = [slice(first, min(first + items_step, num_items)) for first in range(0, num_items, items_step)]
        needs_gradient = with_gradient and any(ctx.needs_input_grad)
        if needs_gradient:
            gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (hidden, table)]
            grad_hidden, grad_items = gradients[0], gradients[1][padding:]
        buffer = aligned_rows(min(rows_step, rows), items_step, hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, rows_step):
            block = slice(start, min(start + rows_step, rows))
            users, answers = hidden[block], targets[block] - first_row - padding
            target_logits = (users.float() * items[answers.clamp(0, num_items - 1)].float()).sum(-1)
            log_normaliser = torch.full_like(target_logits, -torch.inf)
            for tile in tiles:
                logits = _logits(users, items[tile], buffer)
                maximum = torch.maximum(log_normaliser, logits.amax(-1))
                exponentials = logits.sub_(maximum[:, None]).exp_()
                log_normaliser = maximum + torch.log(exponentials.sum(-1) + torch.exp(log_normaliser - maximum))
            if group is not None:
                # Of the shard that has the target.
                target_logits *= (answers >= 0) & (answers < num_items)
                distributed.all_reduce(target_logits, group=group)
                log_normaliser = _log_sum_exp_of_all(log_normaliser, group)
            loss += (log_normaliser - target_logits).sum()
            if not needs_gradient:
                continue
            for tile in tiles:
                if len(tiles) == 1:
                    probabilities = exponentials.mul_(torch.exp(maximum - log_normaliser)[:, None])
                else:
                    probabilities = _logits(users, items[tile], buffer).sub_(log_normaliser[:, None]).exp_()
                # Without a search for those inside, which would have the device waited for.
                inside = (answers >= tile.start) & (answers < tile.stop)
                columns = (answers - tile.start).clamp(0, tile.stop - tile.start - 1)
                probabilities.scatter_add_(1, columns[:, None], -inside[:, None].to(probabilities.dtype))
                probabilities = probabilities.to(hidden.dtype)
                if hidden.dtype == torch.float32:
                    grad_hidden[block].addmm_(probabilities, items[tile])
                    grad_items[tile].addmm_(probabilities.T, users)
                else:
                    grad_hidden[block] += probabilities @ items[tile]
                    grad_items[tile] += probabilities.T @ users
        scale = 1.0 / max(rows, 1)
        if needs_gradient:
            # Not saved as tensors are, but handed over: the backward pass scales them in place, for a second table of
            # a large catalogue would double what training holds.
            ctx.gradients = [gradient.mul_(scale) for gradient in gradients]
            ctx.dtypes = hidden.dtype, table.dtype
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError("The gradients of this loss have been used; compute the loss again.")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [gradient.mul_(grad_output).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes)]
        return *scaled, None, None, None, None, None


def _log_sum_exp_of_all(values: torch.Tensor, group: "distributed.ProcessGroup") -> torch.Tensor:
    """log(sum of exp) of the values that the processes have, each of shape `(rows,)`."""
    maximum = values.clone()
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX, group=group)
    total = torch.exp(values - maximum)
    distributed.all_reduce(total, group=group)
    return maximum + torch.log(total)


def _whole_lines(columns: int) -> int:
    return -(-columns // FLOATS_PER_CACHE_LINE) * FLOATS_PER_CACHE_LINE


def aligned_rows(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Room for `(rows, columns)` in float32 whose rows begin at whole cache lines. A matrix product that is written to
    rows which begin anywhere, as the odd sizes of catalogues make them, takes a CPU half as long again."""
    return torch.empty(rows, _whole_lines(columns), device=device)[:, :columns]


def _logits(users: torch.Tensor, items: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`users @ items.T` in float32, written over `buffer`: a fresh allocation of this size costs as much as the
    product itself on CPU."""
    logits = buffer[: users.shape[0], : items.shape[0]]
    if users.dtype == torch.float32:
        return torch.mm(users, items.T, out=logits)
    return logits.copy_(users @ items.T)

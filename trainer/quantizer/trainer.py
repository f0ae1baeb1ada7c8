"""Training of the quantizer: code search, revival of dead codes, evaluation on held-out items."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback

from mmesid.hub_cards.figures import draw_code_use, draw_distances
from modeling_mmesid.code_search import nearest_anchors
from modeling_mmesid.modeling_mmrqvae import MMRQVAEAnchorBranch, MMRQVAEModel

from ..data.prepared import PreparedDataset
from ..publishing.hub_trainer import HubTrainerMixin
from ..running.arguments import QuantizeArguments
from .evaluation import TAU_POOL, code_metrics, encode_items, evenly, history_distances, recall_at_1, tau_to_others
from .initialization import BALANCING_ITEMS, balance, fit_linear_decoder
from .items import ENCODING_BATCH, ItemTables, read_batches
from .semantic_ids import SEMANTIC_IDS_NAME, semantic_id_examples, write_semantic_ids


# Code vectors that the distances move take larger steps than those that follow residuals.
CODEBOOK_LEARNING_RATES = {"stress": 4e-2, "distance": 1e-2}
# Anchors, drawn anew every epoch, to which training measures the stress of an item: codes must not fit a few by heart.
TRAINING_ANCHORS = 1_024
# Odd, so that no level of an ID is shifted out of its hash.
HASH_FACTOR = 6_364_136_223_846_793_005
ABSENT = torch.iinfo(torch.int64).min


class MMRQVAETrainer(HubTrainerMixin, Trainer):
    """
    A [`~transformers.Trainer`] of [`MMRQVAEModel`] on [`ItemTables`].

    Once an epoch the codes that no item of the epoch chose are moved to where items are, the offsets of balanced
    levels are found anew, and the health of the codes is logged: `use@l_<modality>` (share of the codes that are
    chosen), `dead@l_<modality>` (how many were not, and are revived), `perplexity@l_<modality>`, and
    `collisions_<modality>` (share of the items whose ID another has as well).

    For the objective `"stress"` every epoch begins with a pass of the search over all items, from the codes of their
    nearest anchors and with other anchors, drawn by weight, to measure the stress to; then `args.passes_per_epoch`
    times as many items as there are, drawn by weight too, train the code vectors with these codes. An epoch depends on
    nothing but the model and the seed, so that a training that is resumed between epochs is the same.

    Evaluation on held-out items measures `tau` (Kendall's tau of their distances to near and to any items of the
    training set, mean over the modalities), `tau_<modality>`, `reconstruction_<modality>` (mean squared error over
    variance), `recall@1_<modality>` (how often an item's quantized anchor finds its own quantized vector of the
    modality among those of all held-out items) and the loss.

    Args:
        model ([`MMRQVAEModel`]): Already initialised by [`initialize`].
        args ([`~mmesid.trainer.running.arguments.QuantizeArguments`]): As in [`~transformers.Trainer`].
        train_dataset ([`ItemTables`]): Items to learn from.
        eval_dataset ([`ItemTables`]): Held-out items.
        data ([`~mmesid.trainer.data.prepared.PreparedDataset`], *optional*): What the tables are made from, for
            [`~MMRQVAETrainer.describe`]. Without it nobody knows the items' ids, and the model is published alone.
        kwargs (`dict`, *optional*): Passed on to [`~transformers.Trainer`].

    Raises:
        ValueError: If a setting does not go with the objective.
    """

    stage = "quantize"
    evaluation_name = "held_out"

    def __init__(
        self,
        model: MMRQVAEModel,
        args: QuantizeArguments,
        train_dataset: ItemTables,
        eval_dataset: ItemTables,
        data: PreparedDataset | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        args.remove_unused_columns = False
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_already_a_batch,
            compute_metrics=self._heldout_metrics,
            **kwargs,
        )
        self.data = data
        config = model.config
        if args.codebook_ema_decay > 0:
            if config.objective in ("stress", "distance"):
                raise ValueError(
                    "codebook_ema_decay moves code vectors to the means of their residuals, which the objective "
                    f"'{config.objective}' does not want; set it to 0, or choose another objective."
                )
            for branch in model.branches.values():
                for layer in branch.quantizer.layers:
                    layer.codebook.requires_grad_(False)
        self._identities: dict[str, list[torch.Tensor]] = {name: [] for name in config.modalities}
        self._counts = {name: torch.zeros(config.num_quantizers, config.codebook_size) for name in config.modalities}
        self._steps_counted = 0
        self._losses: dict[str, float] = {}
        self._nearest: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        if config.objective == "stress":
            if args.dataloader_persistent_workers:
                raise ValueError(
                    "dataloader_persistent_workers keeps the codes of the first epoch, and the objective 'stress' "
                    "searches new ones for each; set it to false."
                )
            self.add_callback(_CodeSearch(self))

    def describe(self, directory: Path) -> tuple[dict, dict]:
        """
        Writes the semantic IDs of all items as `semantic_ids.parquet`, and in `figures/` how the codes are used and
        what they do to distances.

        A push during the training does so as well, lest old semantic IDs stay beside new weights. Training waits for
        it: for the objective `"stress"` the search for all items takes as long as some four epochs.

        Returns:
            `tuple[dict, dict]`: Metrics (`items` and `histories`) and details (`data`, `semantic_id_examples`) for the
                stage's record; empty without `data`.
        """
        if self.data is None:
            return {}, {}
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        data, items = self.data, self.train_dataset
        codes, _ = encode_items(model, items, return_quantized=False)
        sequences = data.sequences("validation")
        distances = {
            modality: history_distances(model, modality, items, codes[modality], sequences, seed=self.args.seed)
            for modality in codes
        }
        histories = {modality: pairs.metrics() for modality, pairs in distances.items()}
        write_semantic_ids(directory / SEMANTIC_IDS_NAME, data.item_ids, codes)
        draw_code_use(
            directory / "figures" / "code_use.png",
            {modality: values.numpy() for modality, values in codes.items()},
            model.config.codebook_size,
        )
        draw_distances(
            directory / "figures" / "distances.png",
            {modality: (pairs.before, pairs.after) for modality, pairs in distances.items()},
            {modality: f"{modality}, Kendall's tau {metrics['tau']:.3f}" for modality, metrics in histories.items()},
        )
        examples = semantic_id_examples(codes, data.frequencies, data.item_ids, data.titles)
        metrics = {"items": code_metrics(codes, model.config.codebook_size), "histories": histories}
        return metrics, {"data": data.statistics, "semantic_id_examples": examples}

    @torch.no_grad()
    def search_codes(self, epoch: int) -> None:
        """Gives the items of the training set, and the anchors among them, the codes that they have in this epoch."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        dataset, config = self.train_dataset, model.config
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        codes = {}
        for modality, branch in model.branches.items():
            if modality not in self._nearest:
                self._nearest[modality] = self._nearest_anchors(branch, modality)
            nearest, is_anchor, weights = self._nearest[modality]
            count = min(TRAINING_ANCHORS, int(weights.count_nonzero()))
            chosen = torch.multinomial(weights, count, generator=generator).to(self.args.device)
            branch.anchor_codes.copy_(branch.search(branch.anchors, branch.anchor_codes, chosen)[0])
            rows = dataset.rows_with(modality)
            found = torch.zeros(len(dataset.present[modality]), config.num_quantizers, dtype=torch.long)
            found[rows] = branch.anchor_codes.cpu()[nearest]
            others = rows[~is_anchor]
            batches = read_batches(branch, dataset, modality, others, "search for codes of")
            for part, batch in zip(others.split(ENCODING_BATCH), batches):
                start = found[part].to(self.args.device)
                found[part] = branch.search(branch.standardize(batch), start, chosen)[0].cpu()
            codes[modality] = found
        dataset.codes = codes

    def _nearest_anchors(
        self, branch: MMRQVAEAnchorBranch, modality: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the training set's items that have the modality: the nearest anchor, and whether it is the item itself;
        and the weights of the anchors. Anchors stay the same all through the training."""
        nearest, is_anchor = [], []
        rows = self.train_dataset.rows_with(modality)
        for batch in read_batches(branch, self.train_dataset, modality, rows, "nearest anchors of"):
            inputs = branch.standardize(batch)
            found = nearest_anchors(inputs, branch.anchors)[:, 0]
            nearest.append(found.cpu())
            is_anchor.append((branch.anchors[found] == inputs).all(1).cpu())
        nearest, is_anchor = torch.cat(nearest), torch.cat(is_anchor)
        weights = torch.zeros(len(branch.anchors), dtype=torch.float64)
        # Items with the same embedding share an anchor.
        weights.index_add_(0, nearest[is_anchor], self.train_dataset.weights[rows[is_anchor]].double())
        return nearest, is_anchor, weights

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One group for the code vectors and the offset of their distances, with a rate of their own and no decay, and
        one for encoders and decoders."""
        if self.optimizer is None:
            model = self.model if model is None else model
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            of_codes = (".codebook", ".offset")
            codebooks = [parameter for name, parameter in trained.items() if name.endswith(of_codes)]
            networks = [parameter for name, parameter in trained.items() if not name.endswith(of_codes)]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate = self.args.codebook_learning_rate
            if rate is None:
                rate = CODEBOOK_LEARNING_RATES.get(self.model.config.objective, 1e-3)
            self.optimizer = optimizer_class(
                [
                    {"params": codebooks, "lr": rate, "weight_decay": 0.0},
                    {"params": networks, "weight_decay": self.args.weight_decay},
                ],
                **settings,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        if model.training:
            for name in ("objective_loss", "decoding_loss", "codebook_loss", "commitment_loss", "alignment_loss"):
                self._losses[name] = self._losses.get(name, 0.0) + float(output[name].detach())
            # Codes that were searched for are counted item by item, not batch by batch.
            counted = output.codes if self.train_dataset.codes is None else {}
            for modality, codes in counted.items():
                present = inputs["present"][modality]
                self._identities[modality].append(_identities(codes).masked_fill(~present, ABSENT))
                kept = codes[present].cpu()
                for level in range(kept.shape[1]):
                    self._counts[modality][level] += torch.bincount(
                        kept[:, level], minlength=self._counts[modality].shape[1]
                    )
        return (output.loss, output) if return_outputs else output.loss

    def floating_point_ops(self, inputs: dict) -> int:
        rows = len(next(iter(inputs["embeddings"].values())))
        return 6 * rows * self.model.num_parameters()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.codebook_ema_decay > 0:
            self._average_codebooks(self._prepare_inputs(inputs))
        self._steps_counted += 1
        if self._steps_counted >= self._steps_in_epoch():
            self._end_epoch(self._prepare_inputs(inputs))
        return loss

    def _get_train_sampler(self, train_dataset=None):
        if self.model.config.objective != "stress":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset
        return WeightedSampler(dataset.weights[dataset.rows], self._samples_in_epoch(), self.args.seed)

    def _samples_in_epoch(self) -> int:
        passes = self.args.passes_per_epoch if self.model.config.objective == "stress" else 1
        return passes * len(self.train_dataset)

    def _steps_in_epoch(self) -> int:
        rounded = math.floor if self.args.dataloader_drop_last else math.ceil
        return max(rounded(self._samples_in_epoch() / (self.args.train_batch_size * self.args.world_size)), 1)

    @torch.no_grad()
    def _end_epoch(self, inputs: dict) -> None:
        """Revives the codes that no item chose, balances, and logs the health of the codes and the parts of the
        loss."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        logs = {name: value / self._steps_counted for name, value in self._losses.items()}
        for modality in model.config.modalities:
            counts, identities = self._chosen_codes(modality)
            shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
            perplexity = torch.exp(torch.special.entr(shares).sum(1))
            for level in range(len(counts)):
                logs[f"use@{level + 1}_{modality}"] = float((counts[level] > 0).float().mean())
                logs[f"dead@{level + 1}_{modality}"] = int((counts[level] == 0).sum())
                logs[f"perplexity@{level + 1}_{modality}"] = float(perplexity[level])
            _, owners = torch.unique(identities, return_counts=True)
            logs[f"collisions_{modality}"] = float(owners[owners > 1].sum() / owners.sum().clamp_min(1))
            if model.config.objective == "stress":
                # The code vectors have moved farther than a decoder follows step by step.
                codes = self.train_dataset.codes[modality][self.train_dataset.rows_with(modality)]
                fit_linear_decoder(model.branches[modality], self.train_dataset, modality, codes)
            self._revive(model, modality, counts == 0, inputs)
            self._balance(model, modality)
        self._losses.clear()
        self._steps_counted = 0
        self.log(logs)

    def _chosen_codes(self, modality: str) -> tuple[torch.Tensor, torch.Tensor]:
        """How many items of the epoch chose each code, `(num_quantizers, codebook_size)`, and their IDs, one number an
        item."""
        dataset, counts = self.train_dataset, self._counts[modality]
        if dataset.codes is not None:
            codes = dataset.codes[modality][dataset.rows_with(modality)]
            found = torch.stack([torch.bincount(level, minlength=counts.shape[1]) for level in codes.T])
            return found.to(self.args.device, counts.dtype), _identities(codes)
        found = self.accelerator.reduce(counts.to(self.args.device, copy=True), "sum")
        identities = self.accelerator.gather(torch.cat(self._identities[modality]))
        counts.zero_()
        self._identities[modality].clear()
        return found, identities[identities != ABSENT]

    def _revive(self, model: MMRQVAEModel, modality: str, dead: torch.Tensor, inputs: dict) -> None:
        if not dead.any():
            return
        values = inputs["embeddings"][modality][inputs["present"][modality]]
        branch = model.branches[modality]
        if isinstance(branch, MMRQVAEAnchorBranch):
            taken = branch.anchor_codes
        else:
            residual = branch.latents(branch.standardize(values)).float()
        for level, layer in enumerate(branch.quantizer.layers):
            codes = dead[level].nonzero()[:, 0]
            if isinstance(branch, MMRQVAEAnchorBranch):
                # A code beside that of a random anchor shares its items with it.
                places = layer.codebook[taken[:, level]]
                places = places + 0.1 * places.std() * torch.randn_like(places)
            else:
                places = residual
                residual = residual - layer.decode(layer.encode(residual))
            if len(codes) == 0:
                continue
            vectors = layer.codebook[codes]
            if len(places):
                chosen = torch.randint(len(places), (len(codes),), device=places.device)
                vectors = places[chosen].to(vectors.dtype)
            if self.args.world_size > 1:
                # All processes move a code to the same place, also one whose last batch lacks the modality.
                torch.distributed.broadcast(vectors, 0)
            layer.codebook[codes] = vectors
            state = self.optimizer.state.get(layer.codebook, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][codes] = 0

    def _balance(self, model: MMRQVAEModel, modality: str) -> None:
        """Finds the offsets of balanced levels anew, from the same items every time and on every process."""
        if not any(model.config.sinkhorn_epsilons):
            return
        dataset, branch = self.train_dataset, model.branches[modality]
        rows = dataset.rows_with(modality)
        rows = rows[:: math.ceil(max(len(rows), 1) / BALANCING_ITEMS)]
        inputs = dataset.embeddings[modality][rows].to(self.args.device, torch.float32)
        residual = branch.latents(branch.standardize(inputs))
        for layer, epsilon in zip(branch.quantizer.layers, model.config.sinkhorn_epsilons):
            balance(layer, residual, epsilon)
            residual = residual - layer.decode(layer.encode(residual))

    @torch.no_grad()
    def _average_codebooks(self, inputs: dict) -> None:
        """Moves every code vector that was chosen towards the mean of the residuals that chose it."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        for modality, branch in model.branches.items():
            values = inputs["embeddings"][modality][inputs["present"][modality]]
            residual = branch.latents(branch.standardize(values)).float()
            for layer in branch.quantizer.layers:
                codes = layer.encode(residual)
                vectors = layer.decode(codes)
                counts = torch.bincount(codes, minlength=len(layer.codebook)).to(residual.dtype)
                sums = torch.zeros_like(layer.codebook, dtype=residual.dtype).index_add_(0, codes, residual)
                counts, sums = (self.accelerator.reduce(value, "sum") for value in (counts, sums))
                means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], layer.codebook)
                layer.codebook.lerp_(means.to(layer.codebook.dtype), 1 - self.args.codebook_ema_decay)
                residual = residual - vectors

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns the loss, what the model made of the items, and the items."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        made = {"quantized": output.quantized, "reconstructions": output.reconstructions}
        return output.loss.detach(), made, inputs

    @torch.no_grad()
    def _trained_items(self, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and quantized vectors of the items that held-out ones are compared with, evenly chosen from the
        training set."""
        model: MMRQVAEModel = self.accelerator.unwrap_model(self.model)
        branch, dataset = model.branches[modality], self.train_dataset
        if isinstance(branch, MMRQVAEAnchorBranch):
            # Anchors have the codes that the code vectors were trained with.
            chosen = evenly(len(branch.anchors), TAU_POOL)
            embeddings = branch.anchors[chosen] * branch.input_scale + branch.input_mean
            codes = branch.anchor_codes[chosen]
        else:
            rows = dataset.rows_with(modality)
            rows = rows[evenly(len(rows), TAU_POOL)]
            embeddings = dataset.embeddings[modality][rows].to(self.args.device, torch.float32)
            codes = branch.encode(embeddings)
        return embeddings.float().cpu().numpy(), branch.quantizer.decode(codes).float().cpu().numpy()

    def _heldout_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        quantized, reconstructions = prediction.predictions["quantized"], prediction.predictions["reconstructions"]
        embeddings, present = prediction.label_ids["embeddings"], prediction.label_ids["present"]
        modalities = [name for name in self.model.config.modalities if present[name].sum() > 2]
        metrics = {}
        for modality in modalities:
            mask = present[modality]
            original = embeddings[modality][mask]
            metrics[f"tau_{modality}"] = tau_to_others(
                (original, quantized[modality][mask]), self._trained_items(modality)
            )
            error = np.square(original - reconstructions[modality][mask]).sum()
            metrics[f"reconstruction_{modality}"] = float(error / np.square(original - original.mean(0)).sum())
        metrics["tau"] = float(np.mean([metrics[f"tau_{modality}"] for modality in modalities]))
        anchor = self.model.config.modalities[0]
        for modality in modalities:
            if modality != anchor and anchor in modalities:
                both = present[anchor] & present[modality]
                metrics[f"recall@1_{modality}"] = recall_at_1(quantized[anchor][both], quantized[modality][both])
        return metrics


class WeightedSampler(Sampler):
    """
    Draws indices in proportion to weights, others every epoch and the same on every process.

    The draws are systematic: an index that is expected k times comes floor(k) or ceil(k) times. There may be more
    indices than the 2^24 of [`~torch.utils.data.WeightedRandomSampler`].

    Args:
        weights (`torch.Tensor` of shape `(indices,)`): Weights above 0.
        num_samples (`int`): Draws an epoch.
        seed (`int`): Seed of the first epoch.
    """

    def __init__(self, weights: torch.Tensor, num_samples: int, seed: int):
        self.weights, self.num_samples, self.seed, self.epoch = weights, num_samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        ends = self.weights.double().cumsum(0)
        steps = torch.arange(self.num_samples, dtype=torch.float64) + torch.rand(1, generator=generator)
        drawn = torch.searchsorted(ends, steps * (ends[-1] / self.num_samples), right=True).clamp_max(len(ends) - 1)
        yield from drawn[torch.randperm(self.num_samples, generator=generator)].tolist()


def _identities(codes: torch.Tensor) -> torch.Tensor:
    """One number an ID, `(items,)`: a hash, by arithmetic modulo 2^64, of `codes` `(items, num_quantizers)`."""
    identities = torch.zeros_like(codes[:, 0])
    for level in range(codes.shape[1]):
        identities = identities * HASH_FACTOR + codes[:, level]
    return identities


def _already_a_batch(batch: dict) -> dict:
    return batch


class _CodeSearch(TrainerCallback):
    """Searches for the codes of an epoch before its first batch is read."""

    def __init__(self, trainer: MMRQVAETrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.search_codes(int(state.epoch))

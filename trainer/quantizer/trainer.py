"""Training of the quantizer: losses, revival of dead codes, evaluation on held-out items."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import broadcast, gather
from transformers import EvalPrediction, TrainerCallback

from mmesid.hub_cards.figures import draw_code_use, draw_distances
from modeling_mmesid.modeling_mmrqvae import MMRQVAEBranch, MMRQVAEModel

from ..data.prepared import PreparedDataset
from ..metrics.codes.codes import code_health
from ..publishing.hub_trainer import HubTrainerMixin, without_timings
from ..running.arguments import BestEpochTrainingArguments, check_ranges
from ..running.training import FiniteLossTrainer, refuse_arguments
from .evaluation import code_metrics, encode_items, encode_rows, held_out_metrics, history_distances, sample_items
from .initialization import balance_codes, revive_codes
from .items import ItemTables
from .semantic_ids import SEMANTIC_IDS_NAME, semantic_id_examples, write_semantic_ids


# Code vectors that the distances move take larger steps than those that follow residuals.
CODEBOOK_LEARNING_RATES = {"distance": 1e-2, "paper": 1e-3, "mse": 1e-3}
_ANEW = "a quantizer is initialized from its items; call quantize with other settings for each trial"
REFUSED = {
    "model_init": _ANEW,
    "data_collator": "the tables give the items of a batch at once; pass other tables",
    "compute_metrics": "an evaluation measures distances and codes; override evaluate to add to them",
    "compute_loss_func": "the model computes the loss; choose its objective in the configuration",
    "preprocess_logits_for_metrics": "only distances and codes are measured; override evaluate",
}
LOSSES = ("objective_loss", "decoding_loss", "codebook_loss", "commitment_loss", "alignment_loss")


@dataclass(kw_only=True)
class MMRQVAETrainingArguments(BestEpochTrainingArguments):
    """
    Arguments of [`MMRQVAETrainer`].

    Args:
        > Training

        codebook_learning_rate (`float`, *optional*): Peak learning rate of the code vectors; by default 1e-2 for the
            objective `distance` and 1e-3 for reconstructions.
        validation_fraction (`float`, *optional*, defaults to `0.05`): Share of the items held out to choose the
            checkpoint.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("tau", "tau_*", "reconstruction_*", "recall@1_*", "loss")
    smaller_is_better: ClassVar[tuple[str, ...]] = ("reconstruction_*", "loss")

    codebook_learning_rate: float | None = None
    validation_fraction: float = 0.05
    num_train_epochs: float = 40
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 1024
    learning_rate: float = 3e-4
    early_stopping_patience: int = 10
    lr_scheduler_type: str = "cosine"
    metric_for_best_model: str | None = "tau"

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, share=("validation_fraction",), not_negative=("codebook_learning_rate",))


class MMRQVAETrainer(HubTrainerMixin, FiniteLossTrainer):
    """
    A [`~transformers.Trainer`] of [`MMRQVAEModel`] on [`ItemTables`].

    At the end of every epoch the codes that no item of the training set has are moved to where items are, the offsets
    of balanced levels are found anew, and the parts of the loss and the health of the codes are logged:
    `use@l_<modality>` (share of the codes that are chosen), `dead@l_<modality>` (how many were not, and are revived),
    `perplexity@l_<modality>`, and `collisions_<modality>` (share of the items whose ID another has as well). All of it
    depends on nothing but the model, the items and the seed: a training that is resumed anywhere ends the same.

    Evaluation on held-out items measures `tau` (Kendall's tau of their distances to near and to any items of the
    training set, mean over the modalities), `tau_<modality>`, `reconstruction_<modality>` (mean squared error over
    variance), `recall@1_<modality>` (how often an item's quantized anchor finds its own quantized vector of the
    modality among those of all held-out items) and the loss.

    Args:
        model ([`MMRQVAEModel`]): Already initialized by [`initialize`].
        args ([`MMRQVAETrainingArguments`]): As in [`~transformers.Trainer`].
        train_dataset ([`ItemTables`]): Items to learn from.
        eval_dataset ([`ItemTables`]): Held-out items.
        data ([`~mmesid.trainer.data.prepared.PreparedDataset`], *optional*): What the tables are made from, for
            [`~MMRQVAETrainer.describe`]. Without it nobody knows the items' ids, and the model is published alone.
        kwargs (`dict`, *optional*): Further arguments of [`~transformers.Trainer`], such as `callbacks`.

    Raises:
        ValueError: If an argument of [`~transformers.Trainer`] has no meaning here.
    """

    stage = "quantize"
    evaluation_name = "held_out"
    can_be_sharded = False
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: MMRQVAEModel,
        args: MMRQVAETrainingArguments,
        train_dataset: ItemTables,
        eval_dataset: ItemTables,
        data: PreparedDataset | None = None,
        **kwargs,
    ):
        refuse_arguments(kwargs, REFUSED)
        args = copy.copy(args)
        args.remove_unused_columns = False
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_already_a_batch,
            compute_metrics=self._held_out_metrics,
            **kwargs,
        )
        self.data = data
        # Sums over the batches of the epoch, on the device: to read them would wait for it.
        self._losses = torch.zeros(len(LOSSES), device=self.args.device)
        self._batches = 0
        self.add_callback(_EndOfEpoch(self))

    def hyperparameter_search(self, *args, **kwargs):
        """Raises `ValueError`: what a search would train anew is initialized outside of the trainer."""
        raise ValueError(f"hyperparameter_search has no meaning here: {_ANEW}.")

    def describe(self, directory: Path) -> tuple[dict, dict]:
        """Writes the semantic IDs of all items as `semantic_ids.parquet`, and in `figures/` how the codes are used and
        what they do to distances; returns metrics (`items`, `histories`) and details (`data`, `semantic_id_examples`)
        for the record. Without `data` there is nothing to say. A push during the training describes as well, lest old
        semantic IDs stay beside new weights."""
        if self.data is None:
            return {}, {}
        model, data = self._unwrapped(), self.data
        size, figures = model.config.codebook_size, directory / "figures"
        codes, sequences = (
            encode_items(model, self.train_dataset),
            data.sequences("validation" if data.has_targets else "train"),
        )
        write_semantic_ids(directory / SEMANTIC_IDS_NAME, data.item_ids, codes)
        draw_code_use(figures / "code_use.png", {name: values.numpy() for name, values in codes.items()}, size)
        distances, histories, captions = {}, {}, {}
        for name, values in codes.items():
            pairs = history_distances(model, name, self.train_dataset, values, sequences, self.args.seed)
            distances[name], histories[name] = (pairs.before, pairs.after), pairs.metrics()
            captions[name] = f"{name}, Kendall's tau {histories[name]['tau']:.3f}"
        draw_distances(figures / "distances.png", distances, captions)
        examples = semantic_id_examples(codes, data.frequencies, data.item_ids, data.titles)
        metrics = {"items": code_metrics(codes, size), "histories": histories}
        return metrics, {"data": data.statistics, "semantic_id_examples": examples}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One group for the code vectors, with a rate of their own and no decay, and one for encoders and decoders."""
        if self.optimizer is None:
            model = self.model if model is None else model
            rate = self.args.codebook_learning_rate
            if rate is None:
                rate = CODEBOOK_LEARNING_RATES[self.model.config.objective]
            codebooks: list[torch.nn.Parameter] = []
            networks: list[torch.nn.Parameter] = []
            for name, parameter in model.named_parameters():
                (codebooks if name.endswith(".codebook") else networks).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = [
                {"params": codebooks, "lr": rate, "weight_decay": 0.0},
                {"params": networks, "weight_decay": self.args.weight_decay},
            ]
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and self.accelerator.num_processes > 1:
            # The losses compare the items of a batch with each other: every process takes those of all.
            inputs = {name: gather(tables) for name, tables in inputs.items()}
        output = model(**inputs)
        if model.training:
            self._losses += torch.stack([output[name].detach() for name in LOSSES])
            self._batches += 1
        return (output.loss, output) if return_outputs else output.loss

    def floating_point_ops(self, inputs: dict) -> int:
        rows = len(next(iter(inputs["embeddings"].values())))
        return 6 * rows * self.model.num_parameters()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns the loss, what the model made of the items, and the items."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        made = {"quantized": output.quantized, "reconstructions": output.reconstructions}
        return output.loss.detach(), made, inputs

    def measure(self) -> dict[str, float]:
        """What [`~transformers.Trainer.evaluate`] says of the held-out items, without its timings."""
        return without_timings(self.evaluate())

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Revives the codes that no item has, balances, and logs the parts of the loss and the health of the codes."""
        model = self._unwrapped()
        logs = dict(zip(LOSSES, (self._losses / max(self._batches, 1)).tolist()))
        self._losses.zero_()
        self._batches = 0
        for modality, branch in model.branches.items():
            rows = self.train_dataset.rows_with(modality)
            codes = encode_rows(model, self.train_dataset, modality, rows)
            health = code_health(codes.numpy(), model.config.codebook_size)
            logs |= {f"{name}_{modality}": value for name, value in health.items()}
            self._revive(branch, modality, codes)
            balance_codes(branch, self.train_dataset, modality, model.config.sinkhorn_epsilons)
            for layer in branch.quantizer.layers:
                # The same on all processes, however these round.
                broadcast([layer.codebook, layer.offsets])
        self.log(logs)

    def _revive(self, branch: MMRQVAEBranch, modality: str, codes: torch.Tensor) -> None:
        """Moves the codes that are not among `codes` `(items, num_quantizers)`, and takes their momentum."""
        layers = branch.quantizer.layers
        dead = torch.ones(len(layers), len(layers[0].codebook), dtype=torch.bool)
        dead.scatter_(1, codes.T.long(), False)
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        revive_codes(branch, self.train_dataset, modality, dead, generator)
        for layer, moved in zip(layers, dead, strict=True):
            state = self.optimizer.state.get(layer.codebook, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][moved] = 0

    def _unwrapped(self) -> MMRQVAEModel:
        return self.accelerator.unwrap_model(self.model)

    def _held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return held_out_metrics(prediction, sample_items(self._unwrapped(), self.train_dataset))


class _EndOfEpoch(TrainerCallback):
    """Ends an epoch after its last step of the optimizer, before that step is evaluated and written: a checkpoint that
    is written every so many steps would come before `on_epoch_end`."""

    def __init__(self, trainer: MMRQVAETrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            self.trainer.end_epoch()


def _already_a_batch(batch: dict) -> dict:
    return batch

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "pandas", "pytorch-lightning", "rectools[torch]", "torch"]
# ///
"""RecTools: SASRec, eSASRec (LiGR layers and the sampled softmax, as its README says) and HSTU (the loss of its
tutorial). Timestamps are not in the data, so HSTU attends by positions alone."""

import warnings

import pandas as pd
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.ligr import LiGRLayers

from peer_protocol import TOP_K, Clock, Setting, quality, run, timed, versions


class StepClock(Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def __deepcopy__(self, memo):
        # RecTools trains with a copy of the trainer that it is given.
        return self

    def on_train_batch_end(self, *args, **kwargs):
        self.clock.tick()


PROGRAMS = {
    "SASRec": (SASRecModel, {"loss": "softmax"}),
    "eSASRec": (
        SASRecModel,
        {"transformer_layers_type": LiGRLayers, "loss": "sampled_softmax", "n_negatives": 256},
    ),
    "HSTU": (
        HSTUModel,
        {
            "relative_time_attention": False,
            "loss": "sampled_softmax",
            "n_negatives": 128,
            "lightning_module_kwargs": {"logits_t": 0.05},
        },
    ),
}


def table(setting: Setting, held_out: int) -> Dataset:
    """All interactions but the last `held_out` of each user."""
    users, items = setting.interactions
    frame = pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.groupby(Columns.User).cumcount(), "D")
    before = frame.groupby(Columns.User).cumcount(ascending=False) >= held_out
    return Dataset.construct(frame[before])


def measure(program: str, setting: Setting) -> dict:
    warnings.filterwarnings("ignore")
    seed_everything(setting.seed)
    clock = Clock()
    kind, own = PROGRAMS[program]
    model = kind(
        n_blocks=setting.num_hidden_layers,
        n_heads=setting.num_attention_heads,
        n_factors=setting.hidden_size,
        session_max_len=setting.max_history,
        batch_size=setting.batch_size,
        recommend_batch_size=setting.eval_batch_size,
        lr=setting.learning_rate,
        dropout_rate=setting.dropout,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=lambda: Trainer(
            accelerator="cpu",
            max_epochs=setting.epochs,
            limit_train_batches=setting.steps or None,
            precision="bf16-mixed" if setting.bf16 else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepClock(clock)],
        ),
        **own,
    )
    model.fit(table(setting, held_out=2))
    histories = table(setting, held_out=1)
    users = range(len(setting.sequences))
    found, ranking = timed("rank", lambda: model.recommend(users, histories, k=TOP_K, filter_viewed=True))
    # A user whose items training never saw gets no recommendation.
    recommended = found.pivot(index=Columns.User, columns=Columns.Rank, values=Columns.Item)
    recommended = recommended.reindex(users).fillna(0).to_numpy(dtype=int)
    steps = len(model.data_preparator.get_dataloader_train())
    return {
        "versions": versions("rectools", "pytorch-lightning"),
        "parameters": sum(parameter.numel() for parameter in model.torch_model.parameters()),
        "steps_per_epoch": steps,
        **clock.epoch(steps),
        **ranking,
        **quality(recommended, setting.targets),
    }


if __name__ == "__main__":
    run(measure)

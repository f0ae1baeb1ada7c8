# /// script
# requires-python = ">=3.11"
# dependencies = ["lightning", "numpy", "pandas", "replay-rec[torch]", "torch"]
# ///
"""RePlay: SASRec with the settings of its example notebook."""

import tempfile
import warnings
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from replay.data import FeatureHint, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

from peer_protocol import TOP_K, Clock, Setting, quality, run, timed, versions


class StepClock(Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_end(self, *args, **kwargs):
        self.clock.tick()


def measure(program: str, setting: Setting) -> dict:
    warnings.filterwarnings("ignore")
    lightning.seed_everything(setting.seed)
    clock, padding = Clock(), setting.num_items
    schema = TensorSchema(
        TensorFeatureInfo(
            name="item_id",
            is_seq=True,
            padding_value=padding,
            cardinality=setting.num_items,
            embedding_dim=setting.hidden_size,
            feature_type=FeatureType.CATEGORICAL,
            feature_hint=FeatureHint.ITEM_ID,
        )
    )
    sasrec = SasRec.from_params(
        schema=schema,
        embedding_dim=setting.hidden_size,
        num_heads=setting.num_attention_heads,
        num_blocks=setting.num_hidden_layers,
        max_sequence_length=setting.max_history,
        dropout=setting.dropout,
    )
    model = LightningModule(sasrec, OptimizerFactory(learning_rate=setting.learning_rate))
    # Its items count from 0, with padding behind them.
    sequences = [items - 1 for items in setting.sequences]
    length = setting.max_history
    with tempfile.TemporaryDirectory() as directory:
        training, histories = Path(directory) / "train.parquet", Path(directory) / "predict.parquet"
        pd.DataFrame({"user_id": range(len(sequences)), "item_id": [items[:-2] for items in sequences]}).to_parquet(
            training
        )
        past = [items[:-1] for items in sequences]
        pd.DataFrame({"user_id": range(len(past)), "item_id": past, "seen_ids": past}).to_parquet(histories)
        metadata = {
            "train": {"item_id": {"shape": length + 1, "padding": padding}},
            "predict": {
                "user_id": {},
                "item_id": {"shape": length, "padding": padding},
                "seen_ids": {"shape": length + 2, "padding": padding},
            },
        }
        module = ParquetModule(
            train_path=str(training),
            predict_path=str(histories),
            batch_size={"train": setting.batch_size, "predict": setting.eval_batch_size},
            metadata=metadata,
            transforms=make_default_sasrec_transforms(schema),
        )
        common = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = lightning.Trainer(
            max_epochs=setting.epochs,
            limit_train_batches=setting.steps or None,
            limit_val_batches=0,
            precision="bf16-mixed" if setting.bf16 else "32-true",
            callbacks=[StepClock(clock)],
            **common,
        )
        trainer.fit(model, datamodule=module)

        def rank() -> np.ndarray:
            best = PandasTopItemsCallback(
                TOP_K, "user_id", "item_id", postprocessors=[SeenItemsFilter(setting.num_items)]
            )
            lightning.Trainer(callbacks=[best], inference_mode=True, **common).predict(
                model.eval(), datamodule=module, return_predictions=False
            )
            return best.get_result()

        found, ranking = timed("rank", rank)
    recommended = np.zeros((len(sequences), TOP_K), dtype=int)
    places = found.groupby("user_id").cumcount()
    recommended[found["user_id"].to_numpy(int), places] = found["item_id"].to_numpy(int) + 1
    steps = -(-len(sequences) // setting.batch_size)
    return {
        "versions": versions("replay-rec", "lightning"),
        "parameters": sum(parameter.numel() for parameter in sasrec.parameters()),
        "steps_per_epoch": steps,
        **clock.epoch(steps),
        **ranking,
        **quality(recommended, setting.targets),
    }


if __name__ == "__main__":
    run(measure)

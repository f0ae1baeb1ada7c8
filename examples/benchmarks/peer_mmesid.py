# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "pandas", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""Ours: SASRec, and a Llama that reads free ID vectors."""

import tempfile

import pandas as pd
from transformers import TrainerCallback

import mmesid
from mmesid.trainer.recommender.training import finetune_trainer, sasrec_trainer
from peer_protocol import TOP_K, Clock, Setting, quality, run, timed, versions


class StepClock(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        # With the first step, which has the longest users.
        self.clock.tick()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.tick()


def measure(program: str, setting: Setting) -> dict:
    users, items = setting.interactions
    catalogue = pd.DataFrame({"item_id": range(1, setting.num_items + 1)})
    data = mmesid.prepare(pd.DataFrame({"user_id": users, "item_id": items}), catalogue, columns={"timestamp": None})
    clock = Clock()
    # Steps are as unlike as the lengths of users. The trainer draws groups of so many batches and orders each of them
    # by length: the first group is a fair sample of an epoch.
    group = min(len(setting.sequences) // (4 * setting.batch_size), 50)
    with tempfile.TemporaryDirectory() as directory:
        common = {
            "output_dir": directory,
            "num_train_epochs": setting.epochs,
            "max_steps": max(group, 1) if setting.steps else -1,
            "per_device_train_batch_size": setting.batch_size,
            "per_device_eval_batch_size": setting.eval_batch_size,
            "learning_rate": setting.learning_rate,
            "bf16": setting.bf16,
            "seed": setting.seed,
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if program == "SASRec":
            config = mmesid.SASRecConfig(
                hidden_size=setting.hidden_size,
                num_hidden_layers=setting.num_hidden_layers,
                num_attention_heads=setting.num_attention_heads,
                max_history=setting.max_history,
                embedding_dropout=setting.dropout,
                hidden_dropout=setting.dropout,
                attention_dropout=setting.dropout,
            )
            trainer = sasrec_trainer(data, config, mmesid.SASRecTrainingArguments(**common))
        else:
            model, processor = mmesid.build_recommender(
                data,
                hidden_size=setting.hidden_size,
                num_hidden_layers=setting.num_hidden_layers,
                max_history=setting.max_history,
                token_dropout=setting.dropout,
                output_dropout=setting.dropout,
                user_prompt="{items}",
                seed=setting.seed,
            )
            trainer = finetune_trainer(model, processor, data, mmesid.MMESIDTrainingArguments(**common))
        trainer.add_callback(StepClock(clock))
        trainer.train()
        steps = len(trainer.get_train_dataloader())
        model = trainer.model.eval()
        histories = [items[:-1] for items in setting.sequences]
        recommended, ranking = timed(
            "rank",
            lambda: model.recommend(histories, top_k=TOP_K, batch_size=setting.eval_batch_size).items.numpy(),
        )
    return {
        "versions": versions("transformers"),
        "parameters": model.num_parameters(),
        "steps_per_epoch": steps,
        **clock.epoch(steps),
        **ranking,
        **quality(recommended, setting.targets),
    }


if __name__ == "__main__":
    run(measure)

"""
Trains SASRec on the prepared training split and saves the checkpoint that ranks best on validation.

    mmesid sasrec --prepared_dir runs/quickstart/prepared --output_dir runs/quickstart/sasrec
    accelerate launch -m mmesid.trainer.stages.sasrec --prepared_dir runs/quickstart/prepared \
        --output_dir runs/quickstart/sasrec
"""

from dataclasses import dataclass

from accelerate import PartialState

from modeling_mmesid import SASRecConfig

from ..data.prepared import PreparedDataset
from ..publishing.repository import present
from ..recommender.sasrec_trainer import SASRecTrainingArguments
from ..recommender.training import sasrec_trainer
from ..running.arguments import ReaderArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import fit, trainer_arguments
from ..running.training_log import trackers_at_rest


@dataclass(kw_only=True)
class SASRecArguments(ReaderArguments):
    """Train SASRec, whose item embeddings are the collaborative modality."""

    config_class = SASRecConfig
    model_settings = {
        "Data": ("max_history",),
        "Model": (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "embedding_dropout", "hidden_dropout",
            "attention_dropout",
        ),
    }  # fmt: skip
    training_class = SASRecTrainingArguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(SASRecArguments, argv)
    run = StageRun("sasrec", arguments, inputs={"prepared_dir": arguments.prepared_dir})
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    run.details.update(data=data.statistics)
    with run as staging:
        trainer = sasrec_trainer(data, SASRecConfig(**arguments.config), trainer_arguments(arguments, run))
        trainer.draft_record = run.draft_record
        fit(trainer)
        if data.has_targets:
            with trackers_at_rest(trainer):
                run.metrics["validation"] = trainer.rank()
        if PartialState().is_main_process:
            trainer.model.save_pretrained(staging)
            run.details.update(parameters=trainer.model.num_parameters())
            present(run, trainer)
    trainer.publish(arguments.output_dir)


if __name__ == "__main__":
    run_as_script("sasrec", main)

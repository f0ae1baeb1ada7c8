"""
Trains SASRec on the prepared training split and saves the checkpoint that ranks best on validation.

    mmesid sasrec --prepared_dir runs/quickstart/prepared --output_dir runs/quickstart/sasrec
    accelerate launch -m mmesid.trainer.stages.sasrec --prepared_dir runs/quickstart/prepared \
        --output_dir runs/quickstart/sasrec
"""

import dataclasses

from accelerate import PartialState
from transformers import set_seed

from mmesid.hub_cards import save_card
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation

from ..data.prepared import PreparedDataset
from ..data.windows import EvaluationHistories, TrainingWindows
from ..recommender.sasrec_trainer import SASRecTrainer
from ..running.arguments import SASRecArguments, parse
from ..running.errors import run_as_script
from ..running.records import StageRun
from ..running.training import early_stopping, fit, trainer_arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(SASRecArguments, argv)
    run = StageRun("sasrec", arguments, inputs={"prepared_dir": arguments.prepared_dir})
    if run.is_up_to_date():
        return
    data = PreparedDataset.load(arguments.prepared_dir)
    set_seed(arguments.seed)
    config = SASRecConfig(
        num_items=data.num_items,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=4 * arguments.hidden_size,
        max_position_embeddings=arguments.max_history,
        embedding_dropout=arguments.embedding_dropout,
        hidden_dropout=arguments.hidden_dropout,
        attention_dropout=arguments.attention_dropout,
    )
    run.details.update(data=data.statistics)
    with run as staging:
        trainer = SASRecTrainer(
            SASRecForSequentialRecommendation(config),
            trainer_arguments(arguments, run),
            train_dataset=TrainingWindows(data.sequences("train"), arguments.max_history),
            eval_dataset=EvaluationHistories(data.sequences("validation")),
            callbacks=early_stopping(arguments),
        )
        trainer.draft_record = run.draft_record
        fit(trainer)
        run.metrics["validation"] = trainer.rank()
        if PartialState().is_main_process:
            trainer.model.save_pretrained(staging)
            run.details.update(parameters=trainer.model.num_parameters())
            save_card(staging, dataclasses.asdict(run.draft_record()))
    trainer.publish(arguments.output_dir)


if __name__ == "__main__":
    run_as_script("sasrec", main)

import dataclasses

import pytest
from transformers import TrainingArguments

from mmesid.trainer.running import arguments as stage_arguments
from mmesid.trainer.running.arguments import PushArguments, SASRecArguments, StageArguments, parse


STAGE_CLASSES = [
    value
    for value in vars(stage_arguments).values()
    if dataclasses.is_dataclass(value) and value.__module__ == stage_arguments.__name__
]
REQUIRED = ["--output_dir", "out", "--prepared_dir", "prepared"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags():
    arguments = parse(
        SASRecArguments, [*REQUIRED, "--learning_rate", "5e-4", "--hidden_size", "32", "--force", "true"]
    )
    assert (arguments.output_dir, arguments.prepared_dir) == ("out", "prepared")
    assert (arguments.learning_rate, arguments.hidden_size, arguments.force) == (5e-4, 32, True)


def test_defaults_evaluate_every_epoch_and_keep_the_best():
    arguments = parse(SASRecArguments, REQUIRED)
    assert arguments.eval_strategy == "epoch" == arguments.save_strategy
    assert arguments.load_best_model_at_end
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("ndcg@10", True)


def test_yaml_and_flags_that_override_it(tmp_path):
    recipe = write(tmp_path / "sasrec.yaml", "output_dir: out\nprepared_dir: prepared\nlearning_rate: 1e-4\nseed: 3\n")
    arguments = parse(SASRecArguments, [recipe, "--seed", "5"])
    # YAML 1.1 reads 1e-4 as a string; the stage must not.
    assert arguments.learning_rate == 1e-4
    assert (arguments.prepared_dir, arguments.seed) == ("prepared", 5)


def test_an_unknown_key_of_the_yaml_is_named(tmp_path):
    recipe = write(tmp_path / "sasrec.yaml", "output_dir: out\nprepared_dir: prepared\nlearning_rat: 1\n")
    with pytest.raises(ValueError, match="sets 'learning_rat', which SASRecArguments does not have"):
        parse(SASRecArguments, [recipe])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output_dir: [", r"sasrec.yaml' is not YAML: while parsing a flow node .* line 1"),
        (b"output_dir: \xff", r"sasrec.yaml' is not YAML: 'utf-8' codec can't decode"),
        (b"- output_dir", r"sasrec.yaml' holds no settings; write `flag: value`, one a line"),
    ],
)
def test_a_broken_file_of_settings_is_named(tmp_path, content, message):
    path = tmp_path / "sasrec.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse(SASRecArguments, [str(path)])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="There is no file of settings '.*sasrec.yaml'; correct the path"):
        parse(SASRecArguments, [str(path)])


def test_an_unknown_flag_is_named():
    with pytest.raises(ValueError, match="--learning_rates"):
        parse(SASRecArguments, [*REQUIRED, "--learning_rates", "1"])


def test_a_required_flag_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse(PushArguments, ["--directory", "runs"])
    assert "--repo_id" in capsys.readouterr().err


@pytest.mark.parametrize("arguments_class", STAGE_CLASSES, ids=lambda arguments_class: arguments_class.__name__)
def test_help_explains_every_flag_and_class(arguments_class):
    assert arguments_class.__doc__
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(arguments_class):
        if field.name not in inherited:
            assert field.metadata["help"].endswith("."), f"{arguments_class.__name__}.{field.name}"


def test_every_stage_has_its_class():
    names = {f"{name}Arguments" for name in ("Prepare", "SASRec", "Embed", "Quantize", "Finetune")}
    names |= {f"{name}Arguments" for name in ("Evaluate", "Recommend", "Index", "Push")}
    assert names <= {arguments_class.__name__ for arguments_class in STAGE_CLASSES}
    assert StageArguments in STAGE_CLASSES

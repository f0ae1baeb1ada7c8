"""What a stage's flags and files of settings become, and what is refused before anything is read."""

import ast
import dataclasses
import re
from importlib import import_module

import pytest

from mmesid.trainer.cli import STAGES
from mmesid.trainer.data.sources import SOURCES
from mmesid.trainer.encoders import ENCODERS
from mmesid.trainer.running.arguments import CommandArguments, parse
from mmesid.trainer.running.declarations import stage_declaration, stage_settings
from mmesid.trainer.running.help import stage_help


CLASSES = {
    stage: getattr(import_module(f"mmesid.trainer.stages.{stage}"), stage_declaration(stage).node.name)
    for stage in STAGES
}
SASREC = ["--prepared_dir", "prepared", "--output_dir", "out"]
QUANTIZE = [*SASREC, "--embeddings_dir", "embeddings"]
FINETUNE = [*QUANTIZE, "--quantizer_dir", "quantizer"]
STEPS = ["--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps"]
RECOMMEND = ["--model_dir", "recommender", "--history", "a"]


# Ten lists, each of which holds the one before ten times: ten billion values.
LAUGHS = "l0: &l0 [x]\n" + "".join(f"l{n}: &l{n} [{', '.join(10 * [f'*l{n - 1}'])}]\n" for n in range(1, 11))


def parsed(stage: str, flags: list[str]):
    return parse(CLASSES[stage], flags)


def one_sentence(error: ValueError) -> bool:
    return "\n" not in str(error) and str(error).endswith(".")


def test_flags_become_the_settings_of_stage_model_and_training():
    arguments = parsed("sasrec", [*SASREC, *"--learning_rate 5e-4 --hidden_size 32 --force true".split()])
    assert arguments.output_dir == "out" and arguments.force is True
    assert arguments.config["hidden_size"] == 32 and arguments.config["max_history"] == 50
    assert arguments.training.learning_rate == 5e-4 and arguments.training.eval_strategy == "epoch"
    # The library's parser hands over two of its own in another type than their default has.
    changed = arguments.changed.keys() - {"debug", "include_num_input_tokens_seen"}
    assert changed == {"prepared_dir", "output_dir", "force", "hidden_size", "learning_rate"}


def test_the_defaults_are_those_of_the_classes_that_declare_them():
    for stage, flags in (("sasrec", SASREC), ("quantize", QUANTIZE), ("finetune", FINETUNE)):
        arguments = parsed(stage, flags)
        declared = {field.name: field.default for field in dataclasses.fields(CLASSES[stage].config_class)}
        assert arguments.config and arguments.config.items() <= declared.items()
        trained = CLASSES[stage].training_class(output_dir="out")
        assert arguments.training.to_dict() == trained.to_dict()


@pytest.fixture
def settings_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "settings.yaml")

    return write


def test_flags_override_a_file_of_settings(settings_file):
    path = settings_file("prepared_dir: prepared\noutput_dir: out\nhidden_size: 16\nseed: 3\nbf16: null\n")
    arguments = parsed("sasrec", [path, "--seed", "5"])
    assert (arguments.prepared_dir, arguments.config["hidden_size"], arguments.training.seed) == ("prepared", 16, 5)


def test_a_file_is_checked_as_flags_are(settings_file):
    required = "prepared_dir: a\noutput_dir: b\nembeddings_dir: c\n"
    assert parsed("quantize", [settings_file(required + "modalities: text")]).modalities == ["text"]
    arguments = parsed("quantize", [settings_file(required + "encoder_hidden_dims: []")])
    assert arguments.config["encoder_hidden_dims"] == []
    for text, message in (
        (required + "objective: nonsense", "objective.*nonsense"),
        (required + "codebook_size: many", "--codebook_size: invalid int value: 'many'"),
        (required + "codebok_size: 8", "sets 'codebok_size', which the stage does not have; see `mmesid quantize"),
        ("- output_dir", "holds no settings"),
        ("output_dir: [", "is not YAML"),
        ("a: " * 3000, "is not YAML"),
        ("- " * 3000, "is nested too deeply"),
        ("{a: " * 3000, "is nested too deeply"),
        ("[" * 100_000, "is nested too deeply"),
        (LAUGHS, "values, aliases counted"),
        ("l: &l [*l]", "values, aliases counted"),
        (2**20 * " " + "a: 1", "bytes, and such a file has 1,048,576 at most"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            parsed("quantize", [settings_file(text)])
        assert one_sentence(error.value)
    with pytest.raises(FileNotFoundError, match="no file of settings 'nowhere.yaml'"):
        parsed("quantize", ["nowhere.yaml"])


def test_a_list_may_be_empty():
    baseline, elsewhere = (parsed("finetune", [*flags, "--modalities"]) for flags in (SASREC, FINETUNE))
    assert baseline.modalities == [] and baseline.changed == elsewhere.changed, "what is not read counts for nothing"
    assert parsed("finetune", FINETUNE).modalities is None


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("sasrec", [], "the following arguments are required: .*--prepared_dir.*; see `mmesid sasrec --help`."),
        ("recommend", [], "required: .*--model_dir"),
        ("sasrec", [*SASREC, "--learning_rates", "1"], "unrecognized arguments: --learning_rates"),
        ("sasrec", [*SASREC, "--hidden_size", "17"], "hidden_size 17 is not a multiple of num_attention_heads 2"),
        ("sasrec", [*SASREC, "--max_history", "0"], "max_history is 0"),
        ("sasrec", [*SASREC, "--learning_rate", "nan"], "--learning_rate is not a number"),
        ("sasrec", [*SASREC, "--num_train_epochs", "0"], "--num_train_epochs is 0"),
        ("sasrec", [*SASREC, "--per_device_train_batch_size", "-1"], "--per_device_train_batch_size is -1"),
        ("sasrec", [*SASREC, "--eval_strategy", "never"], "--eval_strategy: invalid choice: 'never'"),
        ("sasrec", [*SASREC, "--embedding_dropout", "1.5"], "embedding_dropout is 1.5"),
        ("sasrec", [*SASREC, "--seed", "-1"], "--seed is -1"),
        ("sasrec", [*SASREC, *STEPS[:2], "--eval_steps", "-1"], "--eval_steps is -1.0; it must be a positive number"),
        ("sasrec", [*SASREC, *STEPS, "--save_steps", "0"], "--save_steps is 0.0; it must be a positive number"),
        ("sasrec", [*SASREC, "--logging_steps", "0"], "--logging_steps is 0.0"),
        ("sasrec", [*SASREC, "--max_steps", "0"], "--max_steps is 0"),
        ("sasrec", [*SASREC, "--max_grad_norm", "-1"], "--max_grad_norm is -1.0; it must be 0 or a positive"),
        ("sasrec", [*SASREC, "--adam_beta1", "1"], "--adam_beta1 is 1.0; it must be at least 0 and below 1"),
        ("sasrec", [*SASREC, "--save_total_limit", "0"], "--save_total_limit is 0"),
        ("sasrec", [*SASREC, "--report_to", "clearml"], "--report_to clearml needs the package clearml, which is not"),
        ("sasrec", [*SASREC, "--report_to", "paper"], "--report_to paper is no service .*; choose among none, all, "),
        ("sasrec", [*SASREC, "--hub_links", "mine"], "link mine= does not have the form kind=owner/name"),
        ("sasrec", [*SASREC, "--save_strategy", "no"], "--save_strategy no does not write one .* --load_best_model"),
        ("sasrec", [*SASREC, "--save_strategy", "steps"], "--load_best_model_at_end true needs a checkpoint of every"),
        ("sasrec", [*SASREC, *STEPS[:4]], "--save_strategy epoch does not write one"),
        ("sasrec", [*SASREC, *STEPS, "--save_steps", "2"], "--save_steps 2 is no multiple of --eval_steps 3"),
        (
            "sasrec",
            [*SASREC, "--eval_strategy", "no", "--lr_scheduler_type", "reduce_lr_on_plateau"],
            "--lr_scheduler_type reduce_lr_on_plateau follows evaluations, and --eval_strategy is no",
        ),
        ("sasrec", [*SASREC, "--metric_for_best_model", "accuracy"], "accuracy is not measured; choose one of hr@"),
        ("sasrec", [*SASREC, "--metric_for_best_model", "loss"], "loss is not measured"),
        ("encoder", [*SASREC, "--image_size", "70"], "image_size is 70; it must be a multiple of 32"),
        ("encoder", [*SASREC, "--held_out_fraction", "1"], "--held_out_fraction is 1.0; it must lie between 0 and 1"),
        ("encoder", [*SASREC, "--image_size", "0"], "--image_size is 0"),
        ("embed", [*SASREC, "--modality", "text", "--encoder", "x"], "There is no encoder 'x'"),
        ("embed", [*SASREC, "--modality", "text", "--shard_size", "0"], "--shard_size is 0"),
        ("quantize", [*QUANTIZE, "--validation_fraction", "0"], "--validation_fraction is 0.0"),
        ("quantize", [*QUANTIZE, "--codebook_size", "0"], "codebook_size.*0"),
        ("quantize", [*QUANTIZE, "--modalities", "text", "text"], "modalities.*twice"),
        ("quantize", [*QUANTIZE, "--sinkhorn_epsilons", "0", "nan", "0", "0"], "--sinkhorn_epsilons is not a number"),
        ("finetune", SASREC, "--embeddings_dir is not set; give the directory, or --modalities without a name"),
        ("finetune", [*FINETUNE, "--max_history", "0"], "max_history is 0"),
        ("finetune", [*FINETUNE, "--token_dropout", "2"], "token_dropout is 2.0"),
        ("finetune", [*FINETUNE, "--hidden_size", "130"], "hidden_size 130 is no multiple of 4"),
        ("finetune", [*FINETUNE, "--user_prompt", "Hello"], "user_prompt must hold {items} exactly once"),
        ("finetune", [*FINETUNE, "--num_candidates", "-3"], "--num_candidates is -3"),
        ("finetune", [*FINETUNE, "--lora_target_modules"], "--lora_target_modules names no layer"),
        ("finetune", [*FINETUNE, "--modalities", "text", "text"], "name none twice"),
        ("finetune", [*FINETUNE, "--lora_r", "-1"], "--lora_r is -1"),
        ("finetune", [*FINETUNE, "--quantization", "nf4", "--lora_r", "0"], "--lora_r 0 trains in full"),
        ("finetune", [*SASREC, "--modalities", "--paper", "true"], "nothing to tell items apart"),
        ("recommend", [*RECOMMEND, "--top_k", "0"], "--top_k is 0; it must be a positive number."),
        ("recommend", RECOMMEND[:2], "either --history"),
        ("recommend", [*RECOMMEND, "--prepared_dir", "prepared"], "either --history"),
        ("recommend", [*RECOMMEND, "--output_file", "out.csv"], "has a suffix that is not written; call it .jsonl or"),
        ("prepare", ["--output_dir", "o", "--source", "synthetic", "--num_users", "0"], "--num_users is 0"),
        (
            "prepare",
            ["--output_dir", "o", "--source", "synthetic", "--validation_fraction", ".6", "--test_fraction", ".6"],
            "are shares that leave some to train on",
        ),
        ("evaluate", [*SASREC, "--model_dirs", "a/x", "b/x"], "Two models are called 'x'"),
        ("evaluate", [*SASREC, "--model_dirs", "a", "--bootstrap_resamples", "0"], "--bootstrap_resamples is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(stage, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(stage, flags)
    assert one_sentence(error.value), error.value


@pytest.mark.parametrize(
    ("flags", "best", "patience"),
    [
        (["--eval_strategy", "no"], False, 0),
        (["--eval_strategy", "no", "--save_strategy", "no"], False, 0),
        (["--save_strategy", "no", "--load_best_model_at_end", "false"], False, 5),
        (["--save_strategy", "best"], True, 5),
        (["--eval_strategy", "no", "--metric_for_best_model", "accuracy"], False, 0),
        (["--metric_for_best_model", "eval_mrr"], True, 5),
    ],
)
def test_what_can_choose_an_epoch_or_needs_none_works(flags, best, patience):
    training = parsed("sasrec", [*SASREC, *flags]).training
    assert training.load_best_model_at_end is best and training.early_stopping_patience == patience


def test_a_metric_that_falls_is_better_small():
    for metric, greater in (("tau", True), ("reconstruction_text", False), ("loss", False)):
        arguments = parsed("quantize", [*QUANTIZE, "--metric_for_best_model", metric])
        assert arguments.training.greater_is_better is greater


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_has_the_names_types_and_defaults_that_the_parser_has(stage):
    settings = stage_settings(stage)
    arguments_class = CLASSES[stage]
    classes = filter(None, (arguments_class, arguments_class.training_class))
    names = {field.name for one in classes for field in dataclasses.fields(one) if field.init}
    assert set(settings) == names.union(*arguments_class.model_settings.values())
    for field in dataclasses.fields(arguments_class):
        setting = settings[field.name]
        required = field.default is field.default_factory is dataclasses.MISSING
        assert (setting.default is None) == required
        if field.default is not dataclasses.MISSING:
            assert ast.literal_eval(setting.default) == field.default
    for name, setting in settings.items():
        if setting.owner != "TrainingArguments":
            assert setting.help.endswith(".") and setting.group, f"{stage}.{name} is not explained"


@pytest.mark.parametrize("stage", STAGES)
def test_what_docstrings_say_of_defaults_is_so(stage):
    settings = stage_settings(stage)
    own = {field.name for field in dataclasses.fields(CLASSES[stage])}
    classes = (CLASSES[stage], CLASSES[stage].config_class, CLASSES[stage].training_class)
    said = 0
    for declaring in filter(None, classes):
        for name, text in re.findall(r"^ +(\w+) \((`[^)]*)\):", declaring.__doc__, flags=re.MULTILINE):
            default = re.search(r"defaults to\s+`(.*?)`", text)
            if name not in settings or (name in own and declaring is not CLASSES[stage]):
                continue
            assert ("*optional*" in text) == (settings[name].default is not None), f"{stage}.{name}"
            if default is not None:
                values = [ast.literal_eval(one) for one in (default[1], settings[name].default)]
                as_said, as_declared = (list(one) if isinstance(one, tuple) else one for one in values)
                assert as_said == as_declared, f"{stage}.{name}"
                said += 1
    assert said > 0


def test_help_is_short_and_grouped():
    assert stage_help("prepare").count("\n  --") <= 29
    text = stage_help("finetune")
    assert text.count("\n  --") <= 29
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Data:", "Items:", "Decoder:", "Adapter:", "Loss:", "Training:"]
    assert "--weight_decay" not in text and "learning_rate 0.001" in text
    everything = stage_help("finetune", all_settings=True)
    assert "  --weight_decay FLOAT  (default: 0.0)\n      " in everything
    assert "  --code_initialization {trained,random}  (default: trained)" in text
    assert "  --lora_target_modules STR ...  (default: gate_proj up_proj down_proj)" in text


def test_the_help_names_every_source_and_encoder():
    for stage, flag, names in (("prepare", "source", SOURCES), ("embed", "encoder", ENCODERS)):
        assert set(names) <= set(re.findall(r"\w+", stage_settings(stage)[flag].help))


def test_every_command_has_its_class():
    assert all(issubclass(arguments_class, CommandArguments) for arguments_class in CLASSES.values())

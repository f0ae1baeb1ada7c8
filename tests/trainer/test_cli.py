import ast
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mmesid
from mmesid.trainer import cli
from mmesid.trainer.cli import STAGES, main
from mmesid.trainer.recipes import packaged_recipes, plan, read_recipe
from mmesid.trainer.running.arguments import parse
from mmesid.trainer.running.errors import run_as_script
from mmesid.trainer.running.files import to_flags

from .running.test_arguments import CLASSES


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
RECIPE = """
output_dir: runs/toy
prepare: {source: synthetic, num_items: 60}
sasrec:
embed:
  - {modality: collaborative}
  - {modality: text, from_file: text.safetensors}
quantize: {modalities: [collaborative, text]}
finetune:
  - {seed: 1}
  - {modalities: [], output_dir: id_only}
evaluate: {}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Replaces the stages: what each was called with, in order; `fail` makes one of them raise."""
    recorded = []
    fail = {}

    def import_module(name, package):
        stage = name.removeprefix(".stages.")

        def stage_main(argv):
            recorded.append((stage, argv))
            if stage in fail:
                raise fail[stage]

        return SimpleNamespace(main=stage_main)

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=import_module))
    return SimpleNamespace(recorded=recorded, fail=fail)


def planned(path, overrides=(), only=()):
    return list(plan(path, read_recipe(path, STAGES, overrides), STAGES, only))


def test_the_package_gives_its_public_names_and_no_others():
    assert set(mmesid.__all__) <= set(dir(mmesid))
    for name in mmesid.__all__:
        assert getattr(mmesid, name) is not None
    nodes = ast.walk(ast.parse(Path(mmesid.__file__).read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    for_type_checkers = {one.asname: "." * node.level + node.module for node in imports for one in node.names}
    assert mmesid._MODULES.items() <= for_type_checkers.items()
    with pytest.raises(AttributeError, match="module 'mmesid' has no attribute 'Recommender'"):
        mmesid.Recommender  # noqa: B018


def test_help_names_every_command_and_none_of_it_waits_for_torch():
    code = (
        "import sys\nfrom mmesid.trainer.cli import STAGES, main\n"
        "for stage in STAGES:\n    main([stage, '--help'])\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    *lines, imported = process.stdout.splitlines()
    assert imported == "[]", process.stderr
    assert lines.count("  --prepared_dir STR  (required)") == 7
    assert "  --model_dir STR  (required)" in lines
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*STAGES, "run", "reproduce", "--objective"}


def test_a_stage_gets_its_flags_untouched(calls):
    main(["sasrec", "--seed", "3", "--unknown"])
    assert calls.recorded == [("sasrec", ["--seed", "3", "--unknown"])]


@pytest.mark.parametrize("error", [ValueError("Item 'x' is unknown."), OSError("'y/z' is no repository.")])
def test_a_users_error_is_one_sentence(calls, capsys, error):
    calls.fail["sasrec"] = error
    with pytest.raises(SystemExit, match="1"):
        main(["sasrec"])
    assert capsys.readouterr().err == f"mmesid sasrec: error: {error}\n"
    with pytest.raises(type(error)):
        main(["--traceback", "sasrec"])
    with pytest.raises(type(error)):
        main(["sasrec", "--traceback"])
    assert calls.recorded == [("sasrec", [])] * 3


def test_exit_statuses_tell_errors_from_flags_that_make_no_command(capsys, tmp_path):
    for argv, status in (
        (["sasrec", "--output_dir", "o"], "2"),
        (["nonsense"], "2"),
        (["recommend", "--model_dir", "m", "--history", "a", "--top_k", "0"], "2"),
        (["recommend", "--model_dir", str(tmp_path), "--history", "a"], "1"),
        (["run", "nowhere.yaml"], "1"),
        (["run"], "2"),
    ):
        with pytest.raises(SystemExit, match=status):
            main(argv)
        assert "error: " in capsys.readouterr().err


def test_without_a_command_they_are_listed(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*STAGES, "run"}


@pytest.mark.parametrize(
    ("error", "status", "said"), [(BrokenPipeError(), 1, ""), (KeyboardInterrupt(), 130, "goes on")]
)
def test_a_closed_pipe_and_ctrl_c_are_no_tracebacks(calls, monkeypatch, capfd, error, status, said):
    calls.fail["sasrec"] = error
    with pytest.raises(SystemExit, match=str(status)), open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        main(["sasrec"])
    written = capfd.readouterr().err
    assert said in written and len(written.splitlines()) == bool(said)


def test_a_stage_that_is_started_as_a_module_says_the_same_sentence(tmp_path, capsys, monkeypatch):
    flags = ["--directory", str(tmp_path / "nowhere"), "--repo_id", "me/it"]
    with pytest.raises(SystemExit, match="1"):
        main(["push", *flags])
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"mmesid push: error: '{tmp_path / 'nowhere' / 'record.json'}' does not exist")
    monkeypatch.setattr(sys, "argv", ["push.py", *flags])
    with pytest.raises(SystemExit, match="1"), warnings.catch_warnings():
        # The module is imported already, and runs a second time as the script.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module("mmesid.trainer.stages.push", run_name="__main__")
    assert capsys.readouterr().err == sentence


def test_a_module_takes_traceback_too(monkeypatch):
    def fail(argv):
        raise ValueError(f"seen: {argv}")

    monkeypatch.setattr(sys, "argv", ["push.py", "--traceback", "--dry_run"])
    with pytest.raises(ValueError, match=r"seen: \['--dry_run'\]"):
        run_as_script("push", fail)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_is_started_as_a_module_takes_its_own_name(stage):
    text = (Path(cli.__file__).parent / "stages" / f"{stage}.py").read_text(encoding="utf-8")
    assert text.endswith(f'if __name__ == "__main__":\n    run_as_script("{stage}", main)\n')


def test_a_defect_of_ours_is_not_hidden(calls):
    calls.fail["sasrec"] = KeyError("bug")
    with pytest.raises(KeyError):
        main(["sasrec"])


def test_a_recipe_runs_its_sections_in_order(calls, recipe):
    main(["run", str(recipe)])
    stages = ["prepare", "sasrec", "embed", "embed", "quantize", "finetune", "finetune", "evaluate", "report"]
    assert [stage for stage, _ in calls.recorded] == stages
    assert calls.recorded[-1][1] == ["--run_dir=runs/toy", "--prepared_dir=runs/toy/prepared"]


def test_directories_are_filled_in(recipe):
    expected = """
- [prepare, {output_dir: runs/toy/prepared, source: synthetic, num_items: 60}]
- [sasrec, {prepared_dir: runs/toy/prepared, output_dir: runs/toy/sasrec}]
- [embed, {prepared_dir: runs/toy/prepared, output_dir: runs/toy/embeddings, modality: collaborative,
    model_name_or_path: runs/toy/sasrec}]
- [embed, {prepared_dir: runs/toy/prepared, output_dir: runs/toy/embeddings, modality: text,
    from_file: text.safetensors}]
- [quantize, {prepared_dir: runs/toy/prepared, embeddings_dir: runs/toy/embeddings, output_dir: runs/toy/quantizer,
    modalities: [collaborative, text]}]
- [finetune, {prepared_dir: runs/toy/prepared, sasrec_dir: runs/toy/sasrec, embeddings_dir: runs/toy/embeddings,
    quantizer_dir: runs/toy/quantizer, output_dir: runs/toy/recommender, seed: 1}]
- [finetune, {prepared_dir: runs/toy/prepared, sasrec_dir: runs/toy/sasrec, embeddings_dir: runs/toy/embeddings,
    quantizer_dir: runs/toy/quantizer, output_dir: runs/toy/id_only, modalities: []}]
- [evaluate, {prepared_dir: runs/toy/prepared, embeddings_dir: runs/toy/embeddings,
    output_dir: runs/toy/evaluation, model_dirs: [runs/toy/sasrec, runs/toy/recommender, runs/toy/id_only]}]
"""
    assert [list(run) for run in planned(recipe)] == yaml.safe_load(expected)


def test_a_setting_wins_over_the_convention(recipe):
    runs = planned(
        recipe, ["embed.model_name_or_path=other/sasrec", "quantize.embeddings_dir=tables"], ["embed", "quantize"]
    )
    assert [settings.get("model_name_or_path") for _, settings in runs] == ["other/sasrec", "other/sasrec", None]
    assert runs[-1][1]["embeddings_dir"] == "tables"


def test_overrides_reach_every_run_of_a_stage_and_move_the_recipe(recipe):
    runs = planned(recipe, ["finetune.num_train_epochs=2", "output_dir=elsewhere"], ["finetune"])
    assert [settings["num_train_epochs"] for _, settings in runs] == [2, 2]
    assert [settings["output_dir"] for _, settings in runs] == ["elsewhere/recommender", "elsewhere/id_only"]


def test_only_and_set_may_be_repeated(calls, recipe):
    flags = "--only sasrec --only prepare --set sasrec.seed=4 --set prepare.seed=5"
    main(["run", str(recipe), *flags.split()])
    assert [stage for stage, _ in calls.recorded] == ["prepare", "sasrec"]
    assert "--seed=5" in calls.recorded[0][1]
    assert "--seed=4" in calls.recorded[1][1]


def test_a_failing_stage_stops_the_recipe(calls, recipe, capsys):
    calls.fail["embed"] = ValueError("The table does not fit.")
    with pytest.raises(SystemExit, match="1"):
        main(["run", str(recipe)])
    assert [stage for stage, _ in calls.recorded] == ["prepare", "sasrec", "embed"]
    assert capsys.readouterr().err == "mmesid embed: error: The table does not fit.\n"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("output_dir: o\nfinetun: {}", [], "section 'finetun', which is no stage"),
        (
            "output_dir: o\nsasrec: {sed: 1}",
            [],
            "sets 'sed', which the stage does not have; see `mmesid sasrec --help",
        ),
        ("sasrec: {}", [], "does not say where to write"),
        ("- sasrec", [], "is no recipe"),
        ("output_dir: [", [], "is not YAML"),
        ("output_dir: o\nsasrec: 3", [], "Section 'sasrec'"),
        ("output_dir: o\nsasrec: {}", ["--only", "embed"], "--only names 'embed', which is no section"),
        ("output_dir: o\nsasrec: {}", ["--set", "embed.seed=1"], "names 'embed', which is no section"),
        ("output_dir: o\nsasrec: {}", ["--set", "sasrec.seed"], "does not have the form stage.key=value"),
        ("output_dir: o\nsasrec: {}", ["--set", "sasrec.seed=["], "--set sasrec.seed=[ has a value that is not YAML"),
        ("output_dir: o\nsasrec: {}", ["--set", "sasrec.sed=1"], "sets 'sed', which the stage does not have"),
        ("output_dir: o\nquantize: [{}, {}]", [], "would be 'o/quantizer'; give each an output_dir of its own"),
        ("output_dir: o\nfinetune: [{output_dir: a/x}, {output_dir: b/x}]\nevaluate: {}", [], "would be 'x'"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_runs_nothing(calls, tmp_path, capsys, text, flags, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="1"):
        main(["run", str(path), *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmesid run: error: ")
    assert message in line
    assert calls.recorded == []


def test_a_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["run", "missing.yaml"])
    message = capsys.readouterr().err
    assert message.startswith("mmesid run: error: There is no recipe 'missing.yaml', neither a file below ")
    assert str(Path.cwd()) in message
    assert "quickstart" in message


def test_a_recipe_from_another_directory_says_where_its_paths_start(calls, tmp_path, monkeypatch, capsys):
    text = "output_dir: o\nprepare: {source: tabular, interactions: a.csv}\nsasrec: {}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "a.csv").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="1"):
        main(["run", "../recipe.yaml"])
    message = capsys.readouterr().err
    assert "'a.csv', which prepare.interactions of '../recipe.yaml' names, is not below" in message
    assert calls.recorded == []
    monkeypatch.chdir(tmp_path)
    main(["run", "recipe.yaml"])
    assert [stage for stage, _ in calls.recorded] == ["prepare", "sasrec", "report"]


def test_a_recipe_that_comes_with_the_package_goes_by_its_name(calls, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["run", "quickstart", "--only", "prepare"])
    assert calls.recorded == [("prepare", ["--source=synthetic", "--output_dir=runs/quickstart/prepared"])]
    assert {path.stem for path in RECIPES} == set(packaged_recipes())


def test_embed_reads_the_encoders_that_the_recipe_trains(tmp_path):
    """Unless it imports a table, or names another encoder or model."""
    path = tmp_path / "recipe.yaml"
    runs = [
        ("{modality: collaborative}", "o/sasrec"),
        ("{modality: collaborative, from_file: table.safetensors}", None),
        ("{modality: collaborative, encoder: sentence}", None),
        ("{modality: collaborative, encoder: null, from_file: null}", "o/sasrec"),
        ("{modality: visual}", "o/encoder"),
        ("{modality: visual, encoder: vision}", None),
        ("{modality: text, encoder: dual_encoder}", "o/encoder"),
        ("{modality: text, encoder: dual_encoder, model_name_or_path: mine}", "mine"),
    ]
    sections = "".join(f"\n  - {run}" for run, _ in runs)
    path.write_text(f"output_dir: o\nsasrec:\nencoder:\nembed:{sections}\n", encoding="utf-8")
    assert [settings.get("model_name_or_path") for _, settings in planned(path, only=["embed"])] == [
        expected for _, expected in runs
    ]


def test_settings_become_the_arguments_they_say():
    settings = {
        "output_dir": "out",
        "prepared_dir": "prepared",
        "modalities": [],
        "backbone_name_or_path": "me/llama",
        "lora_target_modules": ["q_proj", "v_proj"],
        "user_prompt": "-- {items}, please",
        "paper": False,
    }
    training = {"learning_rate": 1e-4, "lr_scheduler_kwargs": {"num_cycles": 2}, "seed": 7}
    arguments = parse(CLASSES["finetune"], to_flags(settings | training))
    assert vars(arguments).items() >= settings.items()
    assert {name: getattr(arguments.training, name) for name in training} == training


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(path):
    runs = planned(path)
    assert [stage for stage, _ in runs][0] == "prepare"
    for stage, settings in runs:
        arguments = parse(CLASSES[stage], to_flags(settings))
        assert arguments.output_dir.startswith(read_recipe(path, STAGES)["output_dir"])


def test_a_real_stage_runs_once_from_a_recipe(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: x\nprepare: {source: synthetic, num_items: 60, num_users: 40}\n", encoding="utf-8")
    command = ["run", str(path), "--set", f"output_dir={tmp_path / 'runs'}"]
    main(command)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    assert tmp_path / "runs" / "prepared" / "items.parquet" in before
    capsys.readouterr()
    main(command)
    assert "is up to date, skipped" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")} == before

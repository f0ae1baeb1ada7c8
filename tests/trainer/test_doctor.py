"""`mmesid doctor`: that what it says beforehand is what happens."""

import importlib
import json
import time
from pathlib import Path

import pytest
import yaml
from transformers import LlamaModel

from mmesid.trainer import doctor
from mmesid.trainer.cli import STAGES, main
from mmesid.trainer.doctor import examine
from mmesid.trainer.estimates import Machine, size_of
from mmesid.trainer.recipes import plan, read_recipe
from mmesid.trainer.recommender.small_llama import new_llama_config, train_tokenizer
from mmesid.trainer.running.files import to_flags

from ..gguf_files import write_gguf


# The quickstart without its encoders, and shorter.
RECIPE = {
    "prepare": {"source": "synthetic", "num_users": 300},
    "sasrec": {"num_train_epochs": 5, "bf16": True},
    "embed": {"modality": "collaborative"},
    "quantize": {"modalities": ["collaborative"], "codebook_size": 64, "num_train_epochs": 5},
    "finetune": {"per_device_train_batch_size": 32, "num_train_epochs": 2, "bf16": True},
    "evaluate": {},
}
TRAINED = ("sasrec", "quantize", "finetune")


@pytest.fixture
def recipe(tmp_path):
    """Writes `RECIPE`, with other sections in place of some, and returns the file."""

    def write(**sections) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run")} | RECIPE | sections, sort_keys=False))
        return path

    return write


SMALL = {"source": "synthetic", "num_users": 500, "num_items": 60}


@pytest.fixture
def machine(monkeypatch):
    """A machine of known speed."""
    machine = Machine("cpu", 8 * 2**30, 50 * 2**30, {"float32": 1e10, "bfloat16": 2e10}, 3e-6)
    monkeypatch.setattr(doctor, "this_machine", lambda *arguments: machine)
    return machine


def test_what_stages_take_is_told_within_a_factor_of_three(recipe, tmp_path, monkeypatch):
    # Seconds of the processor, here and there: whatever else runs, they are this process's own.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    path = recipe()
    runs = list(plan(path, read_recipe(path, STAGES), STAGES))
    report = examine(runs, tmp_path, clock=time.process_time)
    assert not report.problems and not (tmp_path / "run").exists()
    taken = {}
    for stage, settings in runs:
        module = importlib.import_module(f"mmesid.trainer.stages.{stage}")
        start = time.process_time()
        quiet = {"disable_tqdm": True} if stage in TRAINED else {}
        module.main(to_flags(settings | quiet))
        taken[stage] = time.process_time() - start
    told = {one.stage: one for one in report.estimates}
    for stage in TRAINED:
        log = json.loads((tmp_path / "run" / str(STAGES[stage].writes) / "training_log.json").read_text())
        assert told[stage].steps == log["steps"]
        assert taken[stage] / 3 < told[stage].seconds < 3 * taken[stage], (stage, taken, report.estimates)
    record = json.loads((tmp_path / "run" / "recommender" / "record.json").read_text())
    assert record["peak_memory_bytes"] / 3 < told["finetune"].memory < 3 * record["peak_memory_bytes"]
    total = sum(one.seconds for one in report.estimates)
    assert sum(taken.values()) / 3 < total < 3 * sum(taken.values())


def test_the_page_and_its_json_tell_that_a_recipe_can_run(recipe, machine, capsys):
    main(["doctor", str(recipe(prepare=SMALL))])
    page = capsys.readouterr().out
    assert "8.0 GiB of memory, 50.0 GiB free" in page and "10 in float32, 20 in bfloat16" in page
    (line,) = (line for line in page.splitlines() if line.startswith("sasrec"))
    assert line.split()[:5] == ["sasrec", "sasrec", "500", "histories", "20"]
    assert page.rstrip().endswith("It can run.")
    main(["doctor", str(recipe(prepare=SMALL)), "--json", "--set", "sasrec.num_train_epochs=10"])
    found = json.loads(capsys.readouterr().out)
    assert found["can_run"] and found["machine"]["memory"] == 8 * 2**30 and found["versions"]["mmesid"]
    by_stage = {one["stage"]: one for one in found["estimates"]}
    assert by_stage["sasrec"]["steps"] == 40 and by_stage["finetune"]["rows"] == "500 histories"
    assert by_stage["sasrec"]["seconds"] > 0 and by_stage["embed"]["steps"] is None


def test_without_a_recipe_it_says_what_is_installed(machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch", 'no-such-one>=1; extra == "index"'])
    main(["doctor"])
    page = capsys.readouterr().out
    assert "torch 2." in page and "extras that are not installed: index (no-such-one)" in page and "stage" not in page


def test_what_keeps_a_recipe_from_running_is_told_at_once_and_by_the_exit_status(recipe, machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "faiss" else object())
    path = recipe(
        prepare=SMALL,
        embed=[
            {"modality": "collaborative"},
            {"modality": "text", "from_file": "nowhere.parquet"},
            {"modality": "visual", "encoder": "vision", "model_name_or_path": "nobody/nothing"},
        ],
        finetune={"hidden_size": 63},
        quantize={"modalities": ["collaborative", "audio"]},
        index={},
    )
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", str(path)])
    page = capsys.readouterr().out
    for problem in (
        "problem: embed text: 'nowhere.parquet' does not exist",
        "problem: embed visual: ",
        "problem: quantize quantizer: Nothing embeds the modality 'audio'; add it to the section embed",
        "problem: finetune recommender: hidden_size 63 is no multiple of 2",
        "problem: index index: It needs faiss, which is not installed; pip install 'mmesid[index]'.",
    ):
        assert problem in page
    assert page.rstrip().endswith("It cannot run as it is.")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", str(recipe(prepare={"source": "sequences", "source_dir": "nowhere"})), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not found["can_run"] and "nowhere" in found["problems"][0]
    assert found["estimates"][1] == {"stage": "sasrec", "name": "sasrec"} | dict.fromkeys(
        ("rows", "steps", "seconds", "memory")
    )


def test_what_takes_more_memory_than_there_is_is_noted(recipe, machine, capsys):
    main(["doctor", str(recipe(prepare=SMALL, finetune={"hidden_size": 8192, "num_hidden_layers": 24}))])
    assert "note: finetune recommender takes about " in capsys.readouterr().out


def test_a_recipe_whose_stages_read_no_data_has_nothing_to_be_counted(machine, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "index": {"model_dir": str(tmp_path)}}))
    main(["doctor", str(path)])
    assert capsys.readouterr().out.rstrip().endswith("It can run.")


def test_the_size_of_a_pretrained_model_comes_from_its_configuration_alone(tmp_path):
    config = new_llama_config(train_tokenizer(["a b"], 300), 64, 3, 128)
    config.save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    # Attention has four square matrices, the feed-forward layers three of four times the width, norms a vector each.
    assert size.parameters == 3 * (4 * 64**2 + 3 * 4 * 64**2 + 2 * 64) + 64
    assert (size.width, size.layers, size.positions) == (64, 3, 128)


def test_the_size_of_a_decoder_in_a_gguf_file_is_that_of_the_file(tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need gguf; pip install 'mmesid[gguf]'")
    tokenizer = train_tokenizer(["a b"], 300)
    model = LlamaModel(new_llama_config(tokenizer, 64, 3, 128))
    write_gguf(tmp_path / "one.gguf", model, tokenizer)
    size = size_of(str(tmp_path), gguf_file="one.gguf")
    assert (size.all_parameters, size.width, size.layers) == (model.num_parameters(), 64, 3)

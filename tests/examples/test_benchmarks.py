"""The benchmarks of the recommender, tiny and on the generated shop: what they print and that both sides agree. How
fast anything is, is not tested."""

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from mmesid.trainer.data.sources.synthetic import generate_catalogue


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALL = ["--hidden_size", "32", "--num_hidden_layers", "1", "--max_history", "12"]
FLAGS = {
    "finetune_speed": ["--users", "12", "--batch_users", "5", "--rounds", "2"],
    "evaluation_speed": ["--users", "40", "--reference_users", "7", "--batch_users", "16", "--rounds", "2"],
    "memory": ["--items", "100", "400", "--users", "4", "--form", "shared"],
    "recommend_speed": ["--items", "300", "--rounds", "3"],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """The generated shop as a folder with sequences.txt and items.jsonl."""
    folder = tmp_path_factory.mktemp("shop")
    source = generate_catalogue(num_items=80, num_users=60)
    catalogue, interactions = source.catalogue, source.interactions
    items = [{"item": name, "title": title} for name, title in zip(catalogue.item_ids, catalogue.titles())]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with open(folder / "sequences.txt", "w") as file:
        for user, user_id in enumerate(interactions.user_ids):
            bought = interactions.items[np.flatnonzero(interactions.users == user)]
            file.write(" ".join([user_id, *(catalogue.item_ids[item] for item in bought)]) + "\n")
    return folder


@pytest.fixture(scope="module")
def scripts():
    """Imports a benchmark as Python does when it runs the file, and leaves the verbosity as it was."""
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    logging.set_verbosity(verbosity)


def run(script, *flags: str) -> dict:
    """The object that a benchmark prints with `--json`, in this process: a new one would import torch again."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [script.__file__, "--json", *flags])
        script.main()
    return json.loads(output.getvalue())


@pytest.fixture(scope="module")
def results(shop, scripts) -> dict[str, dict]:
    """What every script prints. Parts that it measures in processes of their own are measured in this one, too."""
    printed = {}
    for name, flags in FLAGS.items():
        script, flags = scripts(name), ["--data_dir", str(shop), *SMALL, *flags]
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(script, "in_subprocess"):
                patch.setattr(script, "in_subprocess", lambda *more, of=script, flags=flags: run(of, *flags, *more))
            printed[name] = run(script, *flags)
    return printed


def test_a_part_runs_the_script_again_in_a_process_of_its_own(scripts, monkeypatch):
    code = "import json, sys; print('loading'); print(json.dumps({'flags': sys.argv[1:]}))"
    monkeypatch.setattr(sys, "argv", ["-c", code, "--users", "3"])
    assert scripts("workload").in_subprocess("--memory_of", "ours") == {
        "flags": ["--users", "3", "--memory_of", "ours"]
    }


@pytest.mark.parametrize("name", FLAGS)
def test_one_object_with_a_ratio_and_the_setting(results, name):
    assert results[name]["ratio"] > 0
    setting = results[name]["setting"]
    assert (setting["hidden_size"], setting["num_hidden_layers"], setting["device"]) == (32, 1, "cpu")
    # The real prompt: tokens before the items and closing ones behind.
    assert min(setting["prompt_tokens"]) > 0
    ratios = results[name].get("ratios", {"minimum": 0, "median": results[name]["ratio"], "maximum": np.inf})
    assert ratios["minimum"] <= ratios["median"] == results[name]["ratio"] <= ratios["maximum"]


@pytest.mark.parametrize("name", ["finetune_speed", "evaluation_speed"])
def test_both_sides_have_the_same_loss(results, name):
    losses = results[name]["loss"]
    assert abs(losses["ours"] - losses["reference"]) < 1e-4
    # Not the loss of a model that gives every item the same score.
    assert abs(losses["ours"] - np.log(80)) > 1e-3


def test_training_reads_the_same_targets_in_batches_of_sixteen(results):
    result = results["finetune_speed"]
    assert result["users"] == 12
    assert result["steps"] == {"ours": 3, "reference": -(-result["targets"] // 16)}
    assert all(peak > 2**26 for peak in result["peak_memory_bytes"].values())


def test_evaluation_finds_the_same_ranks(results):
    assert results["evaluation_speed"]["users"] == {"ours": 40, "reference": 7}
    assert results["evaluation_speed"]["largest_rank_difference"] <= 1


def test_memory_subtracts_what_has_one_row_per_item(results):
    small, large = results["memory"]["catalogues"]["100"], results["memory"]["catalogues"]["400"]
    # ID vectors, 32 wide in float32, and two states of Adam for each.
    assert large["table_bytes"]["parameters"] == large["table_bytes"]["gradients"] == 401 * 32 * 4
    assert large["table_bytes"]["optimizer_states"] == 2 * 401 * 32 * 4
    for measured in (small, large):
        assert measured["remaining_bytes"] == measured["peak_bytes"] - sum(measured["table_bytes"].values()) > 0
    assert results["memory"]["ratio"] == large["remaining_bytes"] / small["remaining_bytes"]


def test_quantizers_are_compared_on_tables_and_sequences_of_rows(tmp_path, scripts):
    generator = torch.Generator().manual_seed(0)
    # The last two items were never bought.
    factors = torch.randn(323, 6, generator=generator)
    for name, width in (("vectors", 12), ("texts", 20)):
        table = torch.tanh(factors @ torch.randn(6, width, generator=generator))
        save_file({name: table}, tmp_path / f"{name}.safetensors")
    users = [[user, *(torch.randperm(320, generator=generator)[:9] + 1).tolist()] for user in range(40)]
    (tmp_path / "sequences.txt").write_text("".join(" ".join(map(str, user)) + "\n" for user in users))
    script = scripts("quantizer")
    rows = ["residual k-means", script.DEFAULT]
    result = run(
        script, "--data_dir", str(tmp_path), "--seeds", "0", "--epochs", "1", "--only", *rows,
        "--tables", "collaborative=vectors.safetensors", "text=texts.safetensors",
    )  # fmt: skip
    assert list(result["table"]) == rows
    for values in result["table"].values():
        assert 0.1 < values["tau_collaborative"] < 1 and 0 <= values["collisions"] < 1 and values["seconds"] > 0
    assert result["tau"] == {
        name: result["table"][script.DEFAULT][f"tau_{name}"] for name in ("collaborative", "text")
    }


def test_missing_data_is_one_sentence(tmp_path):
    """Of the command itself, which finds the modules beside it."""
    command = [sys.executable, str(BENCHMARKS / "recommend_speed.py"), "--data_dir", str(tmp_path / "nowhere")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 2
    assert "nowhere' does not exist; name a folder" in process.stderr
    assert "Traceback" not in process.stderr

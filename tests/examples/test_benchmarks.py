"""The benchmarks of the recommender, tiny and on the generated shop: what they print and that both sides agree. How
fast anything is, is not tested."""

import argparse
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
from torch.utils.flop_counter import FlopCounterMode
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


def test_large_decoder_of_tiny_shape_has_one_loss_by_all_ways_and_its_operations_are_counted(scripts):
    script = scripts("gpu")
    flags = ["--users", "12", "--batch_users", "4", "--steps", "2", "--rounds", "1", "--embedding_dim", "8"]
    result = run(script, "--shape", "tiny", "--device", "cpu", "--float32", *flags)
    tiny = result["shapes"]["tiny"]
    assert [way["packing"] for way in tiny["ways"]] == ["packed", "single"]
    assert len(tiny["losses"]) == 2 and abs(tiny["losses"]["packed/sdpa/plain"] - np.log(12_086)) < 0.5
    assert all(way["users_per_second"]["median"] > 0 and way["peak_memory_bytes"] > 2**26 for way in tiny["ways"])

    parser = argparse.Namespace(
        seed=0, device=torch.device("cpu"), float32=True, prompt_tokens=[2, 2], max_history=8, embedding_dim=8
    )
    training = script.Training("tiny", 500, parser)
    # No padding, so that all that is counted is needed: 8 items, and 2 closing tokens for each of them.
    examples = [{"history": np.arange(1, 9), "targets": np.arange(2, 10)} for _ in range(3)]
    way = script.Way("packed", "sdpa", script.PLAIN)
    counted = script.counts(training, examples, packed=True)
    assert counted["targets"] == 24 and counted["positions"] == 3 * (8 + 2 * 8)
    inputs = training.inputs(way, examples)
    with FlopCounterMode(display=False) as counter:
        training.loss(way, inputs).backward()
    # Besides, there are the adapter, the prompt, the items' fusion, and pairs that the mask takes away.
    assert 1.0 < counter.get_total_flops() / script.flops(training, counted) < 1.3


def test_users_of_a_file_are_read_without_their_held_out_items(scripts, shop):
    users = scripts("gpu").read_users(shop / "sequences.txt", None, batch_users=8, max_history=12, seed=0)
    lengths = [len(line.split()) - 1 for line in (shop / "sequences.txt").read_text().splitlines()]
    expected = sorted((min(length - 3, 12) for length in lengths if length > 3), reverse=True)
    assert [len(example["history"]) for example in users.examples] == expected


def test_costs_are_measured_and_drawn_as_catalogue_history_and_codes_grow(scripts, tmp_path):
    script = scripts("scaling")
    sizes = ["--catalogues", "30", "60", "--largest_trained", "30", "--histories", "3", "--rounds", "1"]
    with pytest.MonkeyPatch.context() as patch:
        flags = [*sizes, "--levels", "2", "--codebooks", "8", "--output_dir", str(tmp_path)]
        patch.setattr(sys, "argv", [script.__file__, *flags])
        script.main()
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert set(result["catalogue"]["ten best items"]) == {"30", "60"}
    assert set(result["catalogue"]["training, all items"]) == {"30"}
    for name in ("catalogue", "history", "codes"):
        assert (tmp_path / f"scaling_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_programs_are_compared_on_what_each_recommends(scripts, shop, monkeypatch):
    """Ours in this process; a peer that takes three times as long for an epoch and ten times for the ranking."""
    script, ours, protocol = scripts("peers"), scripts("peer_mmesid"), scripts("peer_protocol")

    def measure(python, library, program, setting):
        with redirect_stdout(io.StringIO()):
            measured = ours.measure("SASRec", setting) | {"peak_memory_bytes": 2**20}
        if library == "mmesid":
            return measured
        slower = {"epoch_cpu_seconds": 3, "rank_cpu_seconds": 10}
        return measured | {name: factor * first[name] for name, factor in slower.items()}

    setting_of = lambda **changes: protocol.Setting(  # noqa: E731
        **{
            "data_dir": str(shop), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_history": 8, "batch_size": 16, "eval_batch_size": 32, "learning_rate": 0.01, "dropout": 0.0,
            "epochs": 1, "steps": 1, "bf16": False, "threads": torch.get_num_threads(), "seed": 0,
        } | changes
    )  # fmt: skip
    first = ours.measure("ID decoder", setting_of())
    assert first["steps_per_epoch"] == -(-60 // 16) and 0 <= first["ndcg@10"] <= first["hr@10"] <= 1
    monkeypatch.setattr(script, "measure", measure)
    result = run(
        script, "--data_dir", str(shop), "--programs", "mmesid SASRec", "RePlay SASRec", "--replay_python", "python",
        "--hidden_size", "16", "--num_hidden_layers", "1", "--max_history", "8", "--batch_size", "16", "--rounds", "1",
    )  # fmt: skip
    assert list(result["programs"]) == ["mmesid SASRec", "RePlay SASRec"]
    own = result["programs"]["mmesid SASRec"]
    assert result["epoch_ratio"] == pytest.approx(3 * first["epoch_cpu_seconds"] / own["epoch_cpu_seconds"]["median"])
    assert result["rank_ratio"] == pytest.approx(10 * first["rank_cpu_seconds"] / own["rank_cpu_seconds"]["median"])


def test_quality_is_that_of_the_ranking_metrics(scripts):
    quality = scripts("peer_protocol").quality(np.array([[3, 1, 2], [5, 4, 6], [9, 8, 7]]), np.array([1, 5, 6]))
    assert quality == {"ndcg@10": pytest.approx((1 / np.log2(3) + 1) / 3), "hr@10": pytest.approx(2 / 3)}


def test_missing_data_is_one_sentence(tmp_path):
    """Of the command itself, which finds the modules beside it."""
    command = [sys.executable, str(BENCHMARKS / "recommend_speed.py"), "--data_dir", str(tmp_path / "nowhere")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 2
    assert "nowhere' does not exist; name a folder" in process.stderr
    assert "Traceback" not in process.stderr

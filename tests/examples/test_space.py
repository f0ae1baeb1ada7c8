"""The Space is whole: code, settings, requirements in the tested versions, a card that the Hub reads."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCard

from mmesid.trainer.running.arguments import parse
from mmesid.trainer.stages.demo import DemoArguments


SPACE = Path(__file__).parents[2] / "examples" / "space"


def test_a_space_is_put_together(tmp_path, monkeypatch, capsys):
    space = tmp_path / "space"
    flags = ["--model", "me/mine", "--data", "me/mine-data", "--output_dir", str(space)]
    monkeypatch.syspath_prepend(str(SPACE))
    import assemble

    assemble.main(flags)

    monkeypatch.chdir(space)
    compile(Path("app.py").read_text(), "app.py", "exec")
    arguments = parse(DemoArguments, ["demo.yaml"])
    assert (arguments.model, arguments.prepared_dir, arguments.host) == ("me/mine", "me/mine-data", "0.0.0.0")
    for name in ("mmesid/trainer/demo/cards.html.jinja", "mmesid/trainer/stages/demo.py", "modeling_mmesid"):
        assert Path(name).exists(), name
    # `mmesid.__version__` is read from there.
    assert len(list(space.glob("mmesid-*.dist-info/METADATA"))) == 1
    requirements = Path("requirements.txt").read_text().splitlines()
    assert "transformers" in {line.split("==")[0] for line in requirements}
    assert all("==" in line for line in requirements[1:]) and not [one for one in requirements if "gradio" in one]
    card = SpaceCard.load(space / "README.md")
    assert card.data.sdk == "gradio" and card.data.models == ["me/mine"] and card.data.sdk_version.startswith("6.")
    assert "neighbours by semantic ID" in card.text

    with pytest.raises(SystemExit):
        assemble.main(flags)
    assert "is there already" in capsys.readouterr().err
    assert yaml.safe_load(Path("demo.yaml").read_text())["port"] == 7860

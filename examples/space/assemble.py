# /// script
# requires-python = ">=3.11"
# dependencies = ["packaging", "pyyaml", "setuptools>=77"]
# ///
"""
Puts a Space together that shows a recommender of the Hub: the page of `mmesid demo`, with this checkout's code.

    python examples/space/assemble.py --model me/mine --data me/mine-data --output_dir space
    hf upload me/mine-demo space . --repo-type space
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put a Space together that shows a recommender of the Hub.")
    parser.add_argument("--model", required=True, help="the recommender's repository, owner/name")
    parser.add_argument("--data", help="the repository of its prepared dataset, for pictures; both must be public")
    parser.add_argument("--output_dir", required=True, type=Path, help="a folder that does not exist yet")
    arguments = parser.parse_args(argv)
    if arguments.output_dir.exists():
        parser.error(f"'{arguments.output_dir}' is there already; name another folder, or remove it.")
    arguments.output_dir.mkdir(parents=True)
    unpack_wheel(arguments.output_dir)
    shutil.copy(HERE / "app.py", arguments.output_dir)
    settings = {"model": arguments.model, "prepared_dir": arguments.data, "host": "0.0.0.0", "port": 7860}
    settings = {name: value for name, value in settings.items() if value is not None}
    (arguments.output_dir / "demo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    gradio, *requirements = pinned_requirements()
    # The Space installs the Gradio of its card; the build of PyTorch for CPUs is a tenth of the other.
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu", *requirements]
    (arguments.output_dir / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    card = {
        "title": f"Recommendations by {arguments.model.split('/')[-1]}",
        "sdk": "gradio",
        "sdk_version": gradio.split("==")[1],
        "python_version": "3.11",
        "app_file": "app.py",
        "models": [arguments.model],
        "datasets": [arguments.data] if arguments.data else [],
    }
    page = f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\n{(HERE / 'card.md').read_text(encoding='utf-8')}"
    (arguments.output_dir / "README.md").write_text(page, encoding="utf-8")
    print(f"hf upload <owner>/<name> {arguments.output_dir} . --repo-type space")


def unpack_wheel(folder: Path) -> None:
    """The packages and their metadata, which lie in the Space's own folder: mmesid is not on PyPI."""
    with tempfile.TemporaryDirectory() as temporary:
        # A copy: the build leaves its files beside what it builds.
        checkout = Path(temporary) / "checkout"
        for name in ("mmesid", "modeling_mmesid", "trainer", "hub_cards", "examples/accelerate", "examples/recipes"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, checkout)
        build = "from setuptools import build_meta; build_meta.build_wheel('..')"
        process = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"The wheel cannot be built:\n{process.stderr}")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def pinned_requirements() -> list[str]:
    """What the page needs, in the versions that are tested; Gradio first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}
    needed = [*project["optional-dependencies"]["demo"], *project["dependencies"]]
    return [pins[canonicalize_name(Requirement(one).name)] for one in needed]


if __name__ == "__main__":
    main()

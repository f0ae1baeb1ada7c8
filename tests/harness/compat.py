"""
`make compat`: the suite with the oldest allowed and the newest versions of the libraries that change most, on each of
some Python versions.

One environment per Python is kept under `.venv-compat`, whose other packages are those of `constraints.txt`.

    python3 tests/harness/compat.py --pythons python3.11 python3.13 --versions oldest --pytest tests/modeling_mmesid

It prints one line per Python and choice of versions, and ends with status 1 if any suite failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[2]
LIBRARIES = ("accelerate", "datasets", "peft", "transformers")


def lower_bounds() -> dict[str, str]:
    """The oldest version that `pyproject.toml` allows of each of the libraries."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in dependencies)
    return {match[1]: match[2] for match in found if match and match[1] in LIBRARIES}


def constraints_of(versions: str) -> str:
    """`constraints.txt` with the oldest versions of the libraries, or without a word about them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if line.split("==")[0] not in LIBRARIES]
    oldest = [f"{name}=={version}" for name, version in lower_bounds().items()] if versions == "oldest" else []
    return "\n".join([*others, *oldest, ""])


def install(python: str, versions: str) -> Path:
    """The environment of this Python, with these versions; its interpreter."""
    name = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = ROOT / ".venv-compat" / name
    if not (environment / "bin" / "pip").exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
    constraints = environment / f"{versions}.txt"
    constraints.write_text(constraints_of(versions), encoding="utf-8")
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", constraints]
    # As in the Makefile: the resolver never sees another torch than the pinned one.
    subprocess.run([*pip, "torch"], check=True)
    upgrade = ["--upgrade", "--upgrade-strategy", "only-if-needed", *LIBRARIES] if versions == "newest" else []
    subprocess.run([*pip, *upgrade, "-e", f"{ROOT}[quickstart,test]"], check=True)
    return environment / "bin" / "python"


def installed(interpreter: Path) -> str:
    show = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {LIBRARIES}))"
    return subprocess.run([interpreter, "-c", show], check=True, capture_output=True, text=True).stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=["python3.11", "python3.13"])
    parser.add_argument("--versions", nargs="+", choices=["oldest", "newest"], default=["oldest", "newest"])
    parser.add_argument("--install_only", action="store_true", help="make the environments and run nothing")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="arguments of pytest, the last flag")
    arguments = parser.parse_args(argv)
    lines = []
    for python in arguments.pythons:
        for versions in arguments.versions:
            interpreter = install(python, versions)
            line = f"{python}, {versions} ({installed(interpreter)}): "
            if arguments.install_only:
                print(line + "installed", flush=True)
                continue
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            command = [interpreter, "-m", "pytest", "-p", "no:cacheprovider", *arguments.pytest]
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as suite:
                last = ""
                for said in suite.stdout:
                    print(said, end="", flush=True)
                    last = said.strip() or last
            lines.append((suite.returncode, line + last))
    print(*(line for _, line in lines), sep="\n")
    return int(any(status for status, _ in lines))


if __name__ == "__main__":
    sys.exit(main())

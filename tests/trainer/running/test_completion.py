"""`mmesid completion`, asked by a real shell what may follow."""

import subprocess

import pytest

from mmesid.trainer.cli import STAGES, main
from mmesid.trainer.recipes import packaged_recipes


ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_mmesid
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def completed(tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "mmesid.bash"
    script.write_text(capsys.readouterr().out)

    def ask(*words):
        command = ["bash", "--norc", "-c", ASK, "ask", str(script), "mmesid", *words]
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert not process.stderr
        return process.stdout.split()

    return ask


def test_a_shell_completes_commands_flags_values_and_recipes(completed):
    assert set(completed("")) == {*STAGES, "run", "reproduce", "doctor", "completion"}
    assert completed("quan") == ["quantize"]
    assert completed("run", "") == list(packaged_recipes())
    assert completed("doctor", "--j") == ["--json"] and completed("run", "quickstart", "--o") == ["--only"]
    assert completed("sasrec", "--num_train") == ["--num_train_epochs"]
    assert completed("sasrec", "--bf16", "") == ["true", "false"]
    assert completed("quantize", "--objective", "") == ["distance", "paper", "mse"]
    # What takes anything is left to the shell, which knows files.
    assert completed("sasrec", "--prepared_dir", "") == []


def test_the_script_for_zsh_is_that_for_bash_behind_what_reads_it(capsys):
    scripts = []
    for shell in ("bash", "zsh"):
        main(["completion", shell])
        scripts.append(capsys.readouterr().out.splitlines()[1:])
    assert scripts[1] == ["autoload -U +X compinit bashcompinit && compinit -u && bashcompinit", *scripts[0]]

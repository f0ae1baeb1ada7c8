"""Scripts that complete `mmesid` in a shell. They hold all names, so that a shell starts no Python to find them."""

from collections.abc import Iterable, Mapping

from .declarations import stage_settings
from .help import HELP_FLAGS, choices_of


SHELLS = ("bash", "zsh")
# What takes a recipe as its first word.
_TAKES_RECIPE = ("run", "reproduce", "doctor")
# zsh reads what is written for bash. Where nothing is found, files are completed.
_SCRIPT = """# Completes mmesid in {shell}; written by `mmesid completion {shell}`.
{before}_mmesid() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    elif [ "${{word:0:1}}" = "-" ]; then
        case "${{COMP_WORDS[1]}}" in
{flags}
        esac
    else
        case "${{COMP_WORDS[1]}} $before" in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _mmesid mmesid
"""
_BEFORE = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit && compinit -u && bashcompinit\n"}


def completion_script(
    shell: str, stages: Iterable[str], others: Mapping[str, Iterable[str]], recipes: Iterable[str]
) -> str:
    """The script for one of `SHELLS`: `stages` have the flags that they declare, `others` are further commands with
    theirs, and `recipes` those that come with the package."""
    flags: dict[str, Iterable[str]] = {**others}
    values = {f"{command} {command}": " ".join(recipes) for command in _TAKES_RECIPE}
    values["completion completion"] = " ".join(SHELLS)
    for stage in stages:
        settings = stage_settings(stage)
        flags[stage] = [*(f"--{name}" for name in settings), *sorted(HELP_FLAGS)]
        for setting in settings.values():
            if choices := choices_of(setting.type):
                values[f"{stage} --{setting.name}"] = " ".join(choices)
    return _SCRIPT.format(
        shell=shell,
        before=_BEFORE[shell],
        commands=" ".join(flags),
        values="\n".join(f'            "{before}") words="{words}";;' for before, words in values.items()),
        flags="\n".join(f'            {name}) words="{" ".join(words)}";;' for name, words in flags.items()),
    )

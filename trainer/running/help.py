"""`mmesid <stage> --help`: from the source text of the classes that declare the settings, without importing them."""

import ast
import re
import textwrap

from .declarations import Setting, stage_declaration, stage_settings


HELP_FLAGS = frozenset({"-h", "--help", "--help_all"})
WIDTH = 100


def stage_help(stage: str, all_settings: bool = False) -> str:
    """The help of a stage: the settings that this project declares, grouped, then one line on those of
    [`~transformers.TrainingArguments`], or, with `all_settings`, these too."""
    settings = stage_settings(stage).values()
    own = [setting for setting in settings if setting.owner != "TrainingArguments"]
    inherited = [setting for setting in settings if setting.owner == "TrainingArguments"]
    summary = (ast.get_docstring(stage_declaration(stage).node) or "").partition("\n\n")[0]
    first = ast.literal_eval(stage_declaration(stage).constant("positional") or "None") or "[settings.yaml]"
    lines = [f"usage: mmesid {stage} {first} [--flag value ...]", "", *_wrapped(summary, 0)]
    for group in dict.fromkeys(setting.group for setting in own):
        lines += ["", f"{group}:", *(line for one in own if one.group == group for line in _explained(one))]
    if inherited and all_settings:
        lines += ["", "transformers.TrainingArguments:", *(line for one in inherited for line in _explained(one))]
    elif inherited:
        changed = (f"{one.name} {_shown(one.default)}" for one in inherited if one.default != one.first_default)
        text = f"The flags of transformers.TrainingArguments besides (by default {', '.join(changed)}): --help_all "
        lines += ["", *_wrapped(text + "explains them.", 0)]
    return "\n".join(lines)


def _explained(setting: Setting) -> list[str]:
    value = "required" if setting.default is None else f"default: {_shown(setting.default)}"
    if setting.default == "None":
        value = "optional"
    return [f"  --{setting.name} {_kind(setting.type)}  ({value})", *_wrapped(setting.help, 6)]


def _kind(annotation: str) -> str:
    """What a flag takes: its choices, or the word for its type."""
    if choices := re.search(r"Literal\[(.*?)\]", annotation):
        return "{" + ",".join(map(str, ast.literal_eval(f"[{choices[1]}]"))) + "}"
    if members := re.search(r"\blist\[?(\w*)", annotation):
        return f"{(members[1] or 'str').upper()} ..."
    names = [name for name in annotation.split(" | ") if name not in ("None", "dict")]
    return "FLOAT" if "float" in names else "true|false" if "bool" in names else names[0].upper()


def _shown(default: str | None) -> str:
    """A default as it would be given: lists and words without Python's signs."""
    try:
        value = ast.literal_eval(default or "None")
    except ValueError:
        return str(default)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)

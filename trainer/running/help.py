"""`mmesid <stage> --help`: from the source text of the classes that declare the settings, without importing them."""

import ast
import textwrap

from .declarations import Setting, inherited_settings, stage_settings, stage_summary


HELP_FLAGS = frozenset({"-h", "--help", "--help_all"})
WIDTH = 100


def stage_help(stage: str, all_settings: bool = False) -> str:
    """
    The help of a stage: the settings that this project declares, grouped, then one line on those of
    [`~transformers.TrainingArguments`].

    Args:
        stage (`str`): Name of the stage.
        all_settings (`bool`, *optional*, defaults to `False`): Explain those of `TrainingArguments` too.
    """
    settings, inherited = stage_settings(stage), inherited_settings(stage)
    own = [setting for name, setting in settings.items() if name not in inherited]
    lines = [f"usage: mmesid {stage} [settings.yaml] [--flag value ...]", "", *_wrapped(stage_summary(stage), 0)]
    for group in dict.fromkeys(setting.group for setting in own):
        lines += ["", f"{group}:"]
        lines += [line for setting in own if setting.group == group for line in _explained(setting)]
    if inherited and all_settings:
        lines += ["", "transformers.TrainingArguments:"]
        lines += [line for name in inherited for line in _explained(settings[name])]
    elif inherited:
        changed = [name for name, setting in inherited.items() if settings[name].default != setting.default]
        defaults = ", ".join(f"{name} {_shown(settings[name].default)}" for name in changed)
        text = (
            f"The flags of transformers.TrainingArguments besides (by default {defaults}): --help_all explains them."
        )
        lines += ["", *_wrapped(text, 0)]
    return "\n".join(lines)


def _explained(setting: Setting) -> list[str]:
    value = "required" if setting.default is None else f"default: {_shown(setting.default)}"
    if setting.default == "None":
        value = "optional"
    head = f"  --{setting.name} {_kind(setting.type)}".rstrip()
    return [f"{head}  ({value})", *_wrapped(setting.help, 6)]


def _kind(annotation: str) -> str:
    """What a flag takes: its choices, or the word for its type."""
    tree = ast.parse(annotation, mode="eval").body
    members = _members(tree)
    for member in members:
        if isinstance(member, ast.Subscript) and ast.unparse(member.value) == "Literal":
            return "{" + ",".join(str(choice) for choice in ast.literal_eval(_as_tuple(member.slice))) + "}"
    names = [ast.unparse(member) for member in members if ast.unparse(member) not in ("None", "dict")]
    if any(name.startswith("list") for name in names):
        inner = next(name for name in names if name.startswith("list")).removeprefix("list").strip("[]") or "str"
        return f"{inner.upper()} ..."
    return "FLOAT" if "float" in names else "true|false" if "bool" in names else names[0].upper()


def _members(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp):
        return [*_members(tree.left), *_members(tree.right)]
    return [tree]


def _as_tuple(tree: ast.expr) -> ast.expr:
    return tree if isinstance(tree, ast.Tuple) else ast.Tuple([tree], ast.Load())


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

"""Write the settings page from the dataclasses of blip3o_jax/config: a hook of MkDocs.

A setting's type, bounds and default are those of its field, its text is the docstring below it.
"""

import ast
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from blip3o_jax.config import MODEL_TYPE, Config, PartConfig
from blip3o_jax.config.fields import Keywords, field_types, is_group, join, unwrapped

MARKER = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the settings in the place of the page's marker (event of MkDocs)."""
    if MARKER not in markdown:
        return markdown
    unique = {(group.path, group.cls): group for group in groups()}
    return markdown.replace(MARKER, "\n".join(map(section, unique.values())))


class Group(typing.NamedTuple):
    """Hold a group of settings: its dotted path, its class and its defaults."""

    path: str
    cls: type
    defaults: Any
    first_family: bool = True  # of several that can be at the path


def groups() -> Iterator[Group]:
    """Yield every group of a run, a part's families one after the other, parents first."""
    return _groups_below(Group("", Config, Config()))


def _groups_below(group: Group) -> Iterator[Group]:
    yield group
    for name, hint in field_types(group.cls).items():
        path = join(group.path, name)
        kind = _element(hint)
        default = getattr(group.defaults, name)
        if not is_group(kind):
            continue
        if issubclass(kind, PartConfig):
            families = kind.families.values()
            for cls in sorted(families, key=lambda cls: not isinstance(default, cls)):
                same = isinstance(default, cls)
                yield from _groups_below(Group(path, cls, default if same else cls(), same))
        else:
            yield from _groups_below(Group(path, kind, default if is_group(hint) else kind()))


def _element(hint: Any) -> Any:
    """Return the type of a setting; that of the elements where it is a tuple of any length."""
    kind, _, _ = unwrapped(hint)
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis:
        return unwrapped(typing.get_args(kind)[0])[0]
    return kind


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
    """Return {field: text} of a class: the string below each field, or that of a base class."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith(Config.__module__.partition(".")[0]):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef), base
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = " ".join(words.split())
    return found


def section(group: Group) -> str:
    """Return the Markdown of a group: heading, the class's docstring, a list of its settings."""
    title = f"`{group.path}`" if group.path else "A run"
    anchor = group.path or "run"
    if issubclass(group.cls, PartConfig):
        title += f" with `{MODEL_TYPE}={group.cls.model_type}`"
        anchor += "" if group.first_family else f"-{group.cls.model_type}"
    level = "###" if "." in group.path else "##"
    lines = [f"{level} {title} {{ #{anchor} }}", "", inspect.getdoc(group.cls) or "", ""]
    for name, hint in field_types(group.cls).items():
        path = join(group.path, name)
        label = f"`{path}`"
        if is_group(_element(hint)):
            label = f"[{label}](#{path})"
        elif group.first_family:  # an anchor stands once on a page
            label += f"{{ #{path} }}"
        default = "" if is_group(hint) else f", default `{getattr(group.defaults, name)!r}`"
        text = descriptions(group.cls).get(name, "")
        lines += [f"{label} {describe(hint)}{default}", f":   {text}", ""]
    return "\n".join(lines)


def describe(hint: Any) -> str:
    """Return the type and the bounds of an annotation in words, as Markdown."""
    kind, constraints, optional = unwrapped(hint)
    rules = [rule for constraint in constraints if (rule := constraint.rule)]
    return ", ".join([_type(kind), *rules]) + (", or `None`" if optional else "")


def _type(kind: Any) -> str:
    if is_group(kind):
        return "group"
    if kind is Keywords:
        return "mapping of names to numbers, text or booleans"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        *others, last = (f"`{value!r}`" for value in args)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        elements = dict.fromkeys(describe(arg) for arg in args if arg is not Ellipsis)
        return f"tuple of {count}elements ({'; '.join(elements)})"
    return f"`{kind.__name__}`"

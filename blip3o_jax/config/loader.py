"""Config files: `configs/X.py[:arg]` plus `a.b=v` overrides -> validated `Config`s.

A config file is Python with one function, `get_config()` or `get_config(arg)`, that returns a
`Config` or an `ml_collections.ConfigDict` of the settings that differ from the defaults; or a
recipe: a dict of named ones to run one after the other.
"""

import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blip3o_jax.config import fields
from blip3o_jax.config.errors import ConfigError, UserError, check, did_you_mean, shown
from blip3o_jax.config.run import Config
from blip3o_jax.config.serializer import from_dict, to_dict

Overrides = Mapping[str, str] | Iterable[tuple[str, str]]

# The first ".py:" ends the path: the argument may be the path of a data set or checkpoint, such as
# photos.py.
_PATH_AND_ARG = re.compile(r"(?P<path>.*?\.py)(?::(?P<arg>.*))?")


def load(path_with_arg: str, overrides: Overrides = ()) -> Config:
    """Return the one config of a file (of a recipe, its last); see `load_recipe`."""
    return list(load_recipe(path_with_arg, overrides).values())[-1]


def load_recipe(path_with_arg: str, overrides: Overrides = ()) -> dict[str, Config]:
    """Return the configs of file `path_with_arg` ("configs/pretrain.py:1.7b") by name, with fields
    replaced by `overrides`. A single config goes by the name "". In a recipe a field replaced is
    replaced in every config; with a name before it ("joint.steps"), in that one. A `model_type` is
    replaced before all other fields, which are then those of the family it names.

    `overrides`: dotted field -> value as text ({"optimizer.learning_rate": "1e-4"}), as a mapping
    or as pairs where a later pair wins. Tuples are written as Python literals: "(16, 32)". The
    result is checked as a whole, after the last override. Raises `UserError` for a missing
    or broken file, an unknown field or a value of the wrong type.
    """
    match = _PATH_AND_ARG.fullmatch(path_with_arg)
    if not match:
        raise UserError(
            f"--config={path_with_arg} must name a Python file: "
            "configs/NAME.py or configs/NAME.py:ARG"
        )
    path = _located(pathlib.Path(match["path"]))
    returned = _call(path, match["arg"])
    recipe = {name: _values(path, config) for name, config in returned.items()}
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    for key, text in sorted(pairs, key=lambda pair: not pair[0].endswith(f".{fields.MODEL_TYPE}")):
        check(
            all(key.split(".")),
            f"--config.{key}={shown(text)} names no field: write --config.GROUP.FIELD=VALUE, as in "
            "--config.optimizer.learning_rate=1e-4",
        )
        name, _, rest = key.partition(".")
        check(
            bool(rest) or name not in recipe,
            f"config key {key} is a stage of the recipe; set one of its fields: "
            f"--config.{key}.steps=VALUE",
        )
        of_one = name in recipe
        for values in [recipe[name]] if of_one else recipe.values():
            override(values, rest if of_one else key, text)
    return {
        name: _checked(path, values, in_python=isinstance(returned[name], Config))
        for name, values in recipe.items()
    }


def _located(path: pathlib.Path) -> pathlib.Path:
    """Return the path of the config file, in the first of `_directories` that has it; `path` itself
    where none has.
    """
    found = (directory / path.name for directory in _directories(path))
    return next((file for file in found if file.exists()), path)


def _directories(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the directories that are searched for the config file `path`: the one it names, and
    for configs/NAME.py then the one that is installed with the package.
    """
    if path.is_absolute() or path.parts[0] != "configs":
        return [path.parent]
    package = pathlib.Path(__file__).parent.parent
    # A wheel holds it as blip3o_jax/configs; in a clone it is next to the package.
    installed = package / "configs"
    root = installed if installed.is_dir() else package.parent / "configs"
    return [path.parent, root.joinpath(*path.parts[1:-1])]


def _values(path: pathlib.Path, returned: Any) -> dict[str, Any]:
    """Return a `Config` or an `ml_collections.ConfigDict` as nested plain values."""
    # A ConfigDict's own `to_dict` fails for a required placeholder without a value.
    plain = returned if isinstance(returned, Config) else _run_user_code(path, returned.to_dict)
    values: dict[str, Any] = to_dict(plain)
    return values


def _checked(path: pathlib.Path, values: dict[str, Any], *, in_python: bool) -> Config:
    """Return the `Config` of `values`.

    Dataclasses have reported invalid values with their line already; a ConfigDict accepts
    anything, so that its fields are checked here.
    """
    try:
        return from_dict(values)
    except ConfigError as error:
        raise error if in_python else ConfigError(f"{path}: {error}") from None


def _call(path: pathlib.Path, arg: str | None) -> dict[str, Any]:
    """Return {name: `Config` or ConfigDict} of the file's function."""
    get_config = _get_config(path)
    parameters = _positional(path, get_config)
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    if arg is None and required:
        raise UserError(
            f"{path} needs an argument, its {required[0]!r}: --config={path}:{required[0].upper()}"
        )
    if arg is not None and not parameters:
        raise UserError(f"{path} takes no argument: use --config={path} without :{arg}")
    result = _run_user_code(path, lambda: get_config() if arg is None else get_config(arg))
    recipe = {"": result} if _is_config(result) else result
    if not (isinstance(recipe, dict) and recipe and all(map(_is_config, recipe.values()))):
        raise UserError(
            f"{path}: get_config() must return a blip3o_jax.config.Config or an "
            f"ml_collections.ConfigDict, not {type(result).__name__}"
        )
    for name in recipe if isinstance(result, dict) else ():
        # Each stage has the directory of its name.
        plain = isinstance(name, str) and re.fullmatch(r"[\w-]+(\.[\w-]+)*", name)
        if not plain:
            raise UserError(
                f"{path}: a stage of a recipe is named by letters and digits, not {shown(name)}"
            )
    return recipe


def _is_config(value: Any) -> bool:
    import ml_collections  # late: --help needs no more than the standard library

    return isinstance(value, Config | ml_collections.ConfigDict)


def _positional(path: pathlib.Path, get_config: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters that take the argument of --config."""
    try:
        parameters = inspect.signature(get_config).parameters.values()
    except (ValueError, TypeError) as error:  # as of `min`
        raise UserError(
            f"{path}: get_config is no function of the file: write def get_config(): ..."
        ) from error
    return [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]


def _get_config(path: pathlib.Path) -> Callable[..., Any]:
    if path.exists() and not path.is_file():
        raise UserError(f"--config={path} is no regular file: name a Python file")
    if not path.is_file():
        names = sorted({p.stem for folder in _directories(path) for p in folder.glob("*.py")})
        near = did_you_mean(path.stem, names, lambda name: str(path.parent / f"{name}.py"))
        raise UserError(f"config file {path} does not exist{near and f'; {near}'}")
    spec = importlib.util.spec_from_file_location(f"blip3o_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    load_module = spec.loader.exec_module
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by name.
    sys.modules[spec.name] = module
    _run_user_code(path, lambda: load_module(module))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(
            f"{path} defines no function get_config(); it must return a blip3o_jax.config.Config "
            "or an ml_collections.ConfigDict"
        )
    get_config: Callable[..., Any] = module.get_config
    return get_config


def _run_user_code(path: pathlib.Path, call: Callable[[], Any]) -> Any:
    """Return `call()`, and raise any exception as a UserError of one line with its place."""
    try:
        return call()
    except SyntaxError as error:
        place = (
            f"{error.filename or path}:{error.lineno}" if error.lineno else error.filename or path
        )
        raise UserError(f"{place}: {type(error).__name__}: {error.msg}") from error
    except KeyboardInterrupt:
        raise
    except (
        BaseException
    ) as error:  # SystemExit and GeneratorExit would end the command without a word
        lines = [
            f.lineno
            for f in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(f.filename) == path
        ]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        if isinstance(error, UserError):
            kind = ConfigError if isinstance(error, ConfigError) else UserError
            raise kind(f"{place}: {error}") from error
        reason = f": {error}" if str(error) else ""
        raise UserError(f"{place}: {type(error).__name__}{reason}") from error


def override(values: dict[str, Any], key: str, text: str) -> None:
    """Set the field at dotted `key` of the nested `values` to `text`, read and checked as the
    field's annotation says.
    """
    cls: type = Config
    group = values
    path = ""
    *groups, name = key.split(".")
    for part in groups:
        hint = _hint(cls, part, path)
        path = fields.join(path, part)
        if not fields.is_group(hint):
            raise UserError(f"config key {key}: {path} is a single value, it has no fields")
        group = group.setdefault(part, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{path} must be a group of fields, not {shown(group)}")
        cls = fields.concrete(hint, group.get(fields.MODEL_TYPE), path)
    if name == fields.MODEL_TYPE and issubclass(cls, fields.PartConfig):
        _change_family(group, cls, text, path)
        return
    hint = _hint(cls, name, path)
    if fields.is_group(hint):
        names = ", ".join(fields.field_types(hint))
        raise UserError(f"config key {key} is a group; set one of its fields: {names}")
    group[name] = fields.convert(fields.parse(text, hint, key), hint, key)


def _change_family(group: dict[str, Any], old: type, model_type: str, path: str) -> None:
    """Make `group`, values of the family `old`, values of the family that `model_type` names: what
    differs from the defaults of `old` stays where the new one has a field of that name, all else
    has the new one's defaults.
    """
    (part,) = (cls for cls in old.__mro__ if fields.PartConfig in cls.__bases__)
    new = fields.concrete(part, model_type, path)
    usual = to_dict(old())
    taken = {
        name: value
        for name, value in group.items()
        if name in fields.field_types(new) and (new is old or value != usual.get(name))
    }
    group.clear()
    group.update(to_dict(new()) | taken)


def _hint(cls: type, name: str, path: str) -> Any:
    hints = fields.field_types(cls)
    if name not in hints:
        raise fields.unknown_key(name, cls, path)
    return hints[name]

"""Settings to and from plain values: config.json of a checkpoint, and
`ml_collections.ConfigDict`.
"""

import dataclasses
from typing import Any, overload

from blip3o_jax.config import fields
from blip3o_jax.config.fields import MODEL_TYPE, Group, PartConfig
from blip3o_jax.config.run import Config


def to_dict(value: Any) -> Any:
    """Return nested plain dicts, lists and scalars: what config.json in a checkpoint holds."""
    if dataclasses.is_dataclass(value):
        own = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return _family(value) | own
    if isinstance(value, dict):
        return {key: to_dict(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    return value


def replace_everywhere(group: Any, **changes: Any) -> Any:
    """Return a group with every field of the names in `changes`, in it or in groups below it, of
    the value given there.
    """
    own = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    replaced = {
        name: replace_everywhere(value, **changes)
        for name, value in own.items()
        if dataclasses.is_dataclass(value)
    }
    replaced |= {name: value for name, value in changes.items() if name in own}
    return dataclasses.replace(group, **replaced)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested dicts as {"a.b": value}."""
    if isinstance(value, dict):
        return {
            k: v
            for key, child in value.items()
            for k, v in flat(child, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}


def to_config_dict(config: Config) -> Any:
    """Return `config` as an `ml_collections.ConfigDict`, which a config file can change field by
    field and return.
    """
    import ml_collections

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return ml_collections.ConfigDict(
                _family(value)
                | {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, fields.Keywords):
            return ml_collections.ConfigDict(dict(value))
        if isinstance(value, tuple):
            return tuple(to_dict(v) if dataclasses.is_dataclass(v) else v for v in value)
        return value

    return convert(config)


def _family(value: Any) -> dict[str, Any]:
    """Return {"model_type": name} of a group that is of a family, else {}."""
    return {MODEL_TYPE: value.model_type} if isinstance(value, PartConfig) else {}


@overload
def from_dict(values: Any) -> Config: ...
@overload
def from_dict(values: Any, cls: type[Group], path: str = "") -> Group: ...
def from_dict(values: Any, cls: Any = Config, path: str = "") -> Any:
    """Return the group `cls` that `to_dict` or `to_config_dict` wrote as `values`; see
    `fields.from_dict`.
    """
    return fields.from_dict(values, cls, path)

"""The table of parts: whole, resolvable, and the only place that names a family."""

import ast
import inspect
import pathlib
import types

import pytest
from flax import nnx

from blip3o_jax import config, part_registry
from blip3o_jax.ar.protocol import LanguageModel
from blip3o_jax.dit.protocol import DiffusionHead
from blip3o_jax.image_tokens.protocol import ImageTokenizer
from blip3o_jax.part_registry import PART_TABLE, resolve
from blip3o_jax.vae.protocol import Autoencoder

PACKAGE = pathlib.Path(part_registry.__file__).parent
PROTOCOLS = {
    "tokenizer": (ImageTokenizer, config.ImageTokenizerConfig),
    "ar": (LanguageModel, config.LanguageModelConfig),
    "dit": (DiffusionHead, config.DiffusionHeadConfig),
    "vae": (Autoencoder, config.AutoencoderConfig),
}


@pytest.mark.parametrize("part", PROTOCOLS)
def test_every_family_has_a_row_and_every_network_its_parts_methods(part):
    protocol, base = PROTOCOLS[part]
    rows = PART_TABLE[part].families
    assert [row.settings for row in rows] == list(base.families.values())
    methods = [n for n, v in vars(protocol).items() if inspect.isfunction(v) and n[0] != "_"]
    for row in rows:
        network = resolve(row.network)
        assert issubclass(network, nnx.Module)
        for name in (*methods, "__call__") if "__call__" in vars(protocol) else methods:
            wanted = inspect.signature(getattr(protocol, name)).parameters
            found = inspect.signature(getattr(network, name)).parameters
            assert set(wanted) <= set(found), f"{row.network}.{name} lacks a parameter"
        offered = {n for cls in base.__mro__ for n in getattr(cls, "__annotations__", ())}
        missing = [n for n in offered if not hasattr(row.settings(), n)]
        assert not missing, f"{row.settings.__name__} offers no {missing}"
        assert resolve(row.conversion).rules


def test_every_part_has_a_seed_index_of_its_own():
    """Check those of the first parts by number: with another, old runs would start from other
    weights."""
    parts_ = ("tokenizer", "text_tower", "ar", "connector", "dit", "vae", "patch_readout")
    parts_ += ("latent_connector", "feature_connector")
    found = {part: spec.seed_index for part, spec in PART_TABLE.items()}
    assert {part: found[part] for part in parts_} == {p: index for index, p in enumerate(parts_)}
    assert part_registry.IMAGE_EMBEDDING_SEED_INDEX == 9
    taken = [*found.values(), part_registry.IMAGE_EMBEDDING_SEED_INDEX]
    assert len(taken) == len(set(taken))


def test_settings_of_no_family_are_a_bug_that_names_the_table():
    with pytest.raises(TypeError, match=r"part 'ar' has no family for int: see part_registry\.py"):
        part_registry.family_of("ar", types.SimpleNamespace(ar=3))


def test_nothing_but_the_table_and_a_familys_own_files_names_a_network():
    """Forbid an import or an attribute; presets, and anchors of published runs, name settings."""
    networks = {
        resolve(row.network).__name__ for name in PROTOCOLS for row in PART_TABLE[name].families
    }
    modules = {
        row.network.partition(":")[0] for name in PROTOCOLS for row in PART_TABLE[name].families
    }
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                if imported & modules and path.parent.name != "convert":
                    found.append(f"{path.relative_to(PACKAGE)}: {node.module}")
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if isinstance(node, ast.Call) and names & networks and path.parent.name != "convert":
                found.append(f"{path.relative_to(PACKAGE)}: {names & networks}")
    assert not found

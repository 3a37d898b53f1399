"""Check the layers of docs/architecture.md: no module imports a higher one."""

import ast
import graphlib
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "blip3o_jax"
LAYERS = (
    ("exits",),
    ("config", "nn", "lora", "connections", "serving", "progress", "provenance"),
    ("files",),
    ("checksums",),
    ("text",),
    ("data",),
    ("rows",),
    ("ar", "image_tokens", "dit", "vae", "connector"),
    ("parts",),
    ("blip3o",),
    ("parallel",),
    ("train",),
    ("model_table", "samples", "sampling_programs", "pipeline"),
    ("rl",),
    ("evaluation",),
    ("demo",),
    ("convert",),
    ("bench",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The package's own face: `blip3o_jax.load` and `python -m blip3o_jax`.
FACE = ("__init__", "__main__")
# The networks may not know each other; what joins them is blip3o.py.
NETWORKS = next(names for names in LAYERS if "dit" in names)


def imports(path: pathlib.Path) -> set[str]:
    """Return the first-level names under blip3o_jax that a file imports, at its top or in a
    function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "blip3o_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blip3o_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("blip3o_jax.")
            }
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_imports_what_stands_above_it(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name in FACE:
        return
    assert name in LEVEL, (
        f"{name} has no place among the layers: give it one here and in docs/architecture.md"
    )
    above = {other for other in imports(path) if LEVEL[other] > LEVEL[name]}
    assert not above, f"{name} imports {', '.join(sorted(above))}"
    if name in NETWORKS:
        assert not imports(path) & set(NETWORKS) - {name}, "networks know nothing of each other"


def test_no_two_files_import_each_other():
    """Check for longer cycles too, of imports at the top of a file or inside a function."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)] = found
    assert len(graph) > 50
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


# What has one implementation: the pattern of doing it by hand, and the files that may.
ONCE = {
    r"google_crc32c": ("checksums.py",),
    r"""str\(e(rror)?\)[^\n]*\.(split\(\)|splitlines|partition\("\\n)""": (
        "config/errors.py",
        "cli/entry.py",
        "bench/peer/interleaved.py",
    ),
    r"unicode_escape": ("config/errors.py",),
    # `files.replacing` leaves the old file or the new one, on disk. Others: conversions, whose
    # directory gets its name last; reports of measurements; locks; logs that are appended to.
    r"""\.write_(bytes|text)\(|np\.save\(|(?<!tarfile\.)open\([^)\n]*["'][wxa]b?["']""": (
        "bench/peer/report.py",
        "bench/peer/worker.py",
        "bench/random_model.py",
        "bench/rl_step.py",
        "bench/sharding/anchors.py",
        "bench/sharding/compiled_step.py",
        "bench/sharding/grid.py",
        "bench/sharding/isolated_process.py",
        "convert/directory.py",
        "convert/tensor_files.py",
        "convert/text_files.py",
        "exits.py",
        "train/metrics.py",
        "train/workdir.py",
    ),
}


@pytest.mark.parametrize("pattern", ONCE)
def test_what_has_one_implementation_is_nowhere_done_by_hand(pattern):
    """Check `checksums.crc32c`; `errors.first_line`, `type_and_line` and `escaped`;
    `files.replacing`.
    """
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == set(ONCE[pattern])

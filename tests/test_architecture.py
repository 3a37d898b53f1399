"""Check the layers of docs/architecture.md: no module imports a higher one."""

import ast
import graphlib
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "blip3o_jax"
LAYERS = (
    ("exits",),
    ("config", "nn", "lora", "serving", "progress", "provenance"),
    ("files",),
    ("checksums",),
    ("text",),
    ("data",),
    ("rows",),
    ("ar", "image_tokens", "dit", "vae", "connector"),
    ("part_registry",),
    ("blip3o",),
    ("parallel",),
    ("train",),
    ("parameter_counts", "samples", "sampling_programs", "pipeline"),
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
    # directory gets its name last; measurements; locks; logs that are appended to.
    r"""\.write_(bytes|text)\(|np\.save\(|(?<!tarfile\.)open\([^)\n]*["'][wxa]b?["']""": (
        "bench/isolated_process.py",
        "bench/peer/worker.py",
        "bench/random_model.py",
        "bench/sharding/compiled_step.py",
        "convert/directory.py",
        "convert/tensor_writer.py",
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


def tasks() -> dict[str, tuple[list[str], str]]:
    """Return {task: (files, how)} of the table in docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| task | files | how |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    return {task: (re.findall(r"`(\S+)`", files), how) for task, files, how in rows}


def defined(path: pathlib.Path) -> set[str]:
    """Return the names that a file defines: at its top, and the methods of its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = set()
    for node in [*tree.body, *(child for cls in classes for child in cls.body)]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_page_lists_twenty_tasks_of_at_most_three_files():
    assert len(tasks()) == 20
    for task, (files, _) in tasks().items():
        assert 1 <= len(files) <= 3, task


@pytest.mark.parametrize("task", tasks())
def test_a_tasks_files_are_there_and_define_what_the_page_names(task):
    """Check a new file's folder, and what is named in lower case without a dot as a setting."""
    files, how = tasks()[task]
    there = [PACKAGE / file for file in files if "NAME" not in file]
    assert all(path.is_file() for path in there), files
    for file in files:
        assert (PACKAGE / file).parent.is_dir(), file
    mentioned = re.findall(r"`([\w./]+)`", how)
    there += [PACKAGE / name for name in mentioned if name.endswith(".py")]
    there += [PACKAGE / name for name in re.findall(r"\((\w+/\w+\.py)\)", how)]
    known = set().union(*(defined(path) for path in there))
    # What the interfaces of a new file are called, and settings of a run.
    for path in ("config/run.py", "config/train.py", "rl/protocol.py", "data/record.py"):
        known |= defined(PACKAGE / path)
    known |= {"create"}  # of a reward's own file
    for name in mentioned:
        if not name.endswith(".py"):
            assert name.rpartition(".")[2] in known, f"{name} is in none of {files}"

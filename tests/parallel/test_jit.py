"""Check that every program that runs a network constrains its activations, in the source and in the
compiled programs."""

import ast
import functools
import pathlib
import types

import jax
import pytest
from flax import nnx

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.train.encode import make_encode
from blip3o_jax.train.loop import make_preview_program
from blip3o_jax.train.stages import STAGES, make_preview
from blip3o_jax.train.state import merge_trees, plan_state
from tests import tiny

PACKAGE = pathlib.Path(__file__).parent.parent.parent / "blip3o_jax"

# Functions that call `jax.jit` itself, and why. All others go through `Strategy.jit`.
INITIALIZES = "makes weights, each in its own sharding; no activation"
NO_NETWORK = "moves or compares arrays, no network"
ONE_DEVICE = "runs on one device, compared with PyTorch"
BARE = {
    "parallel/rules.py::Strategy.jit": "is the one place",
    "train/state.py::_initialize_part": INITIALIZES,
    "train/state.py::create_state": INITIALIZES,
    "train/state.py::_finite": NO_NETWORK,
    "rl/rollouts.py::RolloutIterator.__init__": NO_NETWORK,
    "rl/trainer.py::_reference": NO_NETWORK,
    "train/fingerprint.py::_bits": NO_NETWORK,
    "convert/importer.py::_resize_vocabulary": NO_NETWORK,
    "convert/importer.py::_initialize_part": INITIALIZES,
    "convert/computations.py::joint_computation": ONE_DEVICE,
    "convert/compare.py::_compare": ONE_DEVICE,
    "convert/compare.py::_first_differing_layer.carries": ONE_DEVICE,
    "bench/peer/jax_side.py::Side._draws": "samples noise, no network",
    "bench/rl_step.py::bench": NO_NETWORK,
    "bench/sharding/rollout.py::Rollout.first_arguments": INITIALIZES,
    "bench/sharding/measure.py::calibrate": "measures matrix products",
}


def uses_of_jit(path: pathlib.Path) -> set[str]:
    """Return "file::function" of each function that names a compiling transformation."""
    found = set()

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = (*names, node.name)
        bare = isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit", "pmap")
        owner = node.value.id if bare and isinstance(node.value, ast.Name) else ""
        if owner in ("jax", "nnx", "pjit"):
            found.add(f"{path.relative_to(PACKAGE).as_posix()}::{'.'.join(names)}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            assert not {"jit", "pjit", "pmap"} & {alias.name for alias in node.names}, path
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(ast.parse(path.read_text(encoding="utf-8")), ())
    return found


def test_programs_are_compiled_by_the_strategy():
    found = set().union(*(uses_of_jit(path) for path in PACKAGE.rglob("*.py")))
    assert not found - set(BARE), "compile it by Strategy.jit, or say here why not"
    assert not set(BARE) - found, "no such use any more"


def pins(program, *arguments) -> int:
    """Return how many activations of a program are cut over the batch's axes of the mesh."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                total += ("data", "fsdp") in equation.params["sharding"].spec
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(program)(*arguments).jaxpr)


@functools.cache
def run():
    """Return (configuration, image_token_offset, batch, strategy, plan) of a joint run, from
    shapes alone."""
    cfg, offset, batch = tiny.prepared("joint")
    strategy = tiny.strategy("fsdp", data=2, fsdp=2)
    return cfg, offset, batch, strategy, plan_state(cfg, strategy)


def pipeline():
    cfg, offset, _, strategy, plan = run()
    vocabulary = types.SimpleNamespace(
        image_token_offset=offset,
        image_token_end=offset + cfg.model.tokenizer.codebook_size,
        image_start=1,
        end_of_turn=0,
    )
    params = merge_trees(plan.abstract["params"], plan.abstract["frozen"])
    model = nnx.eval_shape(lambda: Blip3o(cfg.model, STAGES["joint"].parts, seed=0))
    return Pipeline(cfg, nnx.split(model)[0], params, vocabulary, strategy), params


def autoencode():
    pipe, params = pipeline()
    return pipe._autoencode, params, run()[2]["pixels"]


def codes():
    pipe, params = pipeline()
    return pipe._codes, params, run()[2]["tokenizer_pixels"]


def preview():
    cfg, offset, batch, strategy, plan = run()
    program = make_preview_program(make_preview(cfg, offset), plan, strategy)
    keys_B = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    return program, plan.abstract["params"], plan.abstract["frozen"], batch, keys_B


def encode():
    _, _, batch, strategy, plan = run()
    encoders = {part: plan.abstract["frozen"][part] for part in ("tokenizer", "vae")}
    return make_encode(plan, strategy), encoders, batch["pixels"], batch["tokenizer_pixels"]


# Each was once compiled without: its layers lay where the compiler put them.
@pytest.mark.parametrize("program", [autoencode, codes, preview, encode])
def test_activations_are_placed_in_the_program(program):
    compiled, *arguments = program()
    assert pins(compiled, *arguments) > 4

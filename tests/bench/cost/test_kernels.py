"""Check kernels by hand: their cycles, and the source of the table of bundles."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.cost.kernels import _BUNDLES, Bundles, Work, kernel_work
from blip3o_jax.bench.sharding import topology
from blip3o_jax.parallel.chips import CHIPS

ROOT = pathlib.Path(__file__).parents[3]
SPLASH = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[2,8,4096,128], k: bf16[2,8,4096,128]) -> bf16[2,8,4096,128] {
  %q = bf16[2,8,4096,128]{3,2,1,0} parameter(0)
  %k = bf16[2,8,4096,128]{3,2,1,0} parameter(1)
  ROOT %splash_mha_fwd.1 = bf16[2,8,4096,128]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_kv_compute\\": 512}"
}}
}
"""  # noqa: E501
FLOPS = 2 * 2 * 2 * 8 * 4096 * 128 * 4097 // 2


def work(text, chip):
    program = hlo.parse(text)
    main = program.computations[program.entry]
    return kernel_work(main, main.root, CHIPS[chip])


def test_blocks_up_to_the_diagonal_take_their_bundles():
    """Use 8 rows of 8 blocks, 36 of them computed, in each of 16 heads; v5p's two cores take eight
    heads each."""
    for chip, heads in (("v6e", 16), ("v5p", 8)):
        bundles = _BUNDLES[chip, 128, "fwd"]
        want = heads * (36 * bundles.block + 8 * bundles.row + 64 * bundles.step)
        assert work(SPLASH, chip) == Work(FLOPS, want)


def test_a_smaller_block_takes_its_share():
    text = SPLASH.replace("512", "256")
    bundles = _BUNDLES["v6e", 128, "fwd"]
    assert work(text, "v6e").cycles == 16 * (
        136 / 4 * bundles.block + 16 / 2 * bundles.row + 256 * bundles.step
    )


@pytest.mark.parametrize(
    ("text", "chip"),
    [
        (SPLASH.replace("128", "64"), "v6e"),
        (SPLASH, "v4"),
        (re.sub("frontend_attributes=.*?}}\n", "\n", SPLASH, flags=re.S), "v6e"),
    ],
    ids=["head size", "chip", "no blocks"],
)
def test_what_has_not_been_counted_has_no_cycles(text, chip):
    assert work(text, chip).cycles == 0 and work(text, chip).flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "head"), sorted({key[:2] for key in _BUNDLES}))
def test_the_table_is_what_the_compiler_schedules(chip, head, tmp_path):
    pytest.importorskip("libtpu")
    environment = os.environ | topology.settings(CHIPS[chip]) | {"PYTHONPATH": str(ROOT)}
    environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-m", "tests.bench.cost.splash_program", chip, str(head)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for kind in ("fwd", "dkv"):
        (path,) = (
            p
            for p in tmp_path.glob(f"*splash_m*_{kind}_*-final_bundles.txt")
            if "schedule" not in p.name
        )
        found, want = counted(path.read_text(encoding="utf-8")), _BUNDLES[chip, head, kind]
        assert found.block == pytest.approx(want.block, rel=0.02)
        assert (found.row, found.step) == pytest.approx((want.row, want.step), rel=0.2)


def counted(text):
    """Return the bundles of straight-line code between the marks of regions: the longest is a block
    of scores, the one that opens the loop and the one after the block are a row's, the rest every
    step's."""
    regions = [0]
    for mark in re.findall(
        r"^ *(?:0x[0-9a-f]+|0) +((?:LH|LB|LE|PB|PF|CT)?)[:\w]* *:? *>* *\{?", text, flags=re.M
    ):
        if mark:
            regions.append(0)
        regions[-1] += 1
    block = regions.index(max(regions))
    row = (1, block + 1)
    return Bundles(
        regions[block],
        sum(regions[i] for i in row),
        sum(n for i, n in enumerate(regions) if i not in (*row, block)),
    )

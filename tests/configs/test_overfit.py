"""The promise of configs/overfit.py, kept from end to end: photographs go in, and come back for
their captions.
"""

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import SourceConfig, loader
from blip3o_jax.data.images import crop_and_resize, decode
from blip3o_jax.data.sources import open_source

ROOT = pathlib.Path(__file__).parents[2]

PHOTOGRAPHS = {
    "astronaut": "a smiling astronaut in an orange space suit",
    "brick": "a wall of grey bricks",
    "camera": "a man in a black coat behind a camera on a tripod",
    "cell": "a single cell under the microscope",
    "chelsea": "a tabby cat looking into the camera",
    "clock_motion": "a clock blurred by motion",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "ancient coins in rows on a dark ground",
    "grass": "blades of grass from above",
    "gravel": "a path of gravel",
    "hubble_deep_field": "thousands of galaxies in a dark sky",
    "ihc": "stained tissue in blue and brown under the microscope",
    "moon": "the surface of the moon with its craters",
    "motorcycle_left": "a red motorcycle parked in a garage",
    "retina": "the retina of an eye with its blood vessels",
    "rocket": "a rocket on the launch pad before the start",
}


def write_photographs(path: pathlib.Path) -> pathlib.Path:
    """Write a webdataset tar of the photographs that scikit-image ships inside its package."""
    folder = pathlib.Path(pytest.importorskip("skimage.data").__file__).parent
    with tarfile.open(path, "w") as archive:
        for name, caption in PHOTOGRAPHS.items():
            file = next(folder.glob(f"{name}.*"))
            for member, data in ((file.name, file.read_bytes()), (f"{name}.txt", caption.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def _blip3o(*arguments: str, cwd: pathlib.Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "blip3o_jax", *arguments], cwd=cwd, env=environment, check=True
    )


@pytest.mark.slow
def test_photographs_come_back_for_their_captions(tmp_path):
    tar = write_photographs(tmp_path / "photographs.tar")
    (tmp_path / "captions.txt").write_text("\n".join(PHOTOGRAPHS.values()), encoding="utf-8")
    began = time.monotonic()
    _blip3o(
        "train", f"--config={ROOT}/configs/overfit.py", f"--config.data.path={tar}", cwd=tmp_path
    )
    _blip3o(
        "sample",
        "--checkpoint=runs/overfit",
        "--prompts_file=captions.txt",
        "--out=samples",
        cwd=tmp_path,
    )
    seconds = time.monotonic() - began

    size = loader.load(str(ROOT / "configs/overfit.py")).model.image_size
    source = open_source(SourceConfig(str(tar)))
    originals = np.stack(
        [crop_and_resize(decode(source[i].image), size) for i in range(len(source))]
    ).astype(np.float64)
    samples = np.stack(
        [np.array(Image.open(tmp_path / f"samples/{i:05d}.png")) for i in range(len(source))]
    )
    errors = np.mean(
        (samples[:, None] - originals[None]) ** 2, axis=(2, 3, 4)
    )  # [sample, photograph]
    nearest = errors.argmin(axis=1)
    right = int(np.sum(nearest == np.arange(len(source))))
    rmse = np.sqrt(np.diag(errors))
    print(
        f"{right} of {len(source)} nearest to their own; "
        f"root mean square error {rmse.round(1)} of 255; {seconds:.0f} s"
    )
    assert right >= 14, f"nearest photographs: {nearest.tolist()}"

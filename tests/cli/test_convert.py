"""`blip3o convert` and `blip3o bench conversion`: what their flags become, and what is refused
before anything is read.
"""

import argparse
import json
import sys
import types

import pytest

from blip3o_jax import cli
from blip3o_jax.cli.convert_export import _size
from blip3o_jax.cli.convert_import import _mesh
from blip3o_jax.config import MeshConfig, UserError
from tests.cli.test_commands import CONFIG, stub  # noqa: F401


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("700B", 700),
        ("3kb", 3000),
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("2 GiB", 2**31),
        ("1.5KiB", 1536),
        ("1e3mb", 10**9),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text, size):
    assert _size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0.4B", "-5GB", "5XB", "5GBB", "five", "inf", "nan", "1e999GB", "5GiBB"]
)
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size, such as 5GB, 500MB or 2GiB"):
        _size(text)


def test_meshes():
    assert _mesh("data=1,fsdp=8,strategy=fsdp") == MeshConfig(data=1, fsdp=8, strategy="fsdp")
    assert _mesh(" data=-1 , fsdp=2, tensor=2,strategy=fsdp_tp") == MeshConfig(
        data=-1, fsdp=2, tensor=2, strategy="fsdp_tp"
    )


EXPORT = ["convert", "export", "--source=c", "--out=o"]
IMPORT = ["convert", "import", "--source=s", "--out=o"]
VERIFY = ["convert", "verify", "--torch=t", "--jax=j"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert"], "WAY"),
        (["convert", "translate"], "'translate' is not one of import, export"),
        (["convert", "import", "--out=o"], "--source"),
        (["convert", "export", "--source=c"], "--out"),
        (["convert", "verify", "--torch=t"], "--jax"),
        ([*EXPORT, "--max_shard_size=5XB"], "'5XB' is no size, such as 5GB, 500MB or 2GiB"),
        ([*EXPORT, "--dtype=int8"], "'int8' is not one of"),
        ([*IMPORT, "--mesh=fdsp=8"], "unknown config key --mesh.fdsp"),
        ([*IMPORT, "--mesh=fsdp=many"], "fsdp='many' must be of type int"),
        ([*IMPORT, "--mesh=fsdp"], "fsdp='' must be of type int"),
        ([*IMPORT, "--mesh=fsdp=--8"], "--mesh"),
        (["bench"], "NAME"),
        (["bench", "conversion", "--out=o"], "--config"),
        (["bench", "conversion", "--config=c.py"], "--out"),
        (
            ["bench", "conversion", "--config=c.py", "--out=o", "--dtype=float64"],
            "'float64' is not one of float32",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.startswith("blip3o: error: ") and words in err and err.count("\n") == 1, err


def summary(**fields):
    return types.SimpleNamespace(seconds=2.0, peak=3e9, notes=("it is late",), **fields)


def test_export(stub, capsys):  # noqa: F811
    calls = stub("convert.exporter", "export_weights", summary(size=5e8, tensors=7))
    assert (
        cli.main(
            [
                *EXPORT,
                "--parts=ar, dit",
                "--dtype=float16",
                "--max_shard_size=2MiB",
                "--ema",
                "--overwrite",
            ]
        )
        == 0
    )
    assert cli.main(EXPORT) == 0
    (paths, given), (_, plain) = calls
    assert [str(p) for p in paths] == ["c", "o"]
    assert given == {
        "parts": ("ar", "dit"),
        "dtype": "float16",
        "max_shard_bytes": 2**21,
        "ema": True,
        "overwrite": True,
    }
    assert plain == {
        "parts": (),
        "dtype": "",
        "max_shard_bytes": 5 * 10**9,
        "ema": False,
        "overwrite": False,
    }
    printed = capsys.readouterr()
    assert printed.err == 2 * "note: it is late\n"
    assert (
        printed.out.splitlines()[0]
        == "exported 7 tensors, 0.50 GB, to o in 2.0 s (0.25 GB/s), peak 3.00 GB resident"
    )


def test_import(stub, capsys):  # noqa: F811
    opened = types.SimpleNamespace(notes=("both are there",))
    sources = stub("convert.source", "open_source", opened)
    done = summary(parameters=8e8, host_bytes=8e8, largest=5e6, read_seconds=1.0, allowed=4e9)
    calls = stub("convert.importer", "import_weights", done)
    flags = [
        "--diffusion=d",
        "--ta_tok=t.pth",
        "--ta_tok_config=t.json",
        "--initialise=connector,image_embeddings",
    ]
    flags.append("--variant=bf16")
    assert (
        cli.main(
            [
                *IMPORT,
                *flags,
                "--dtype=bfloat16",
                "--mesh=data=1,fsdp=8,strategy=fsdp",
                "--overwrite",
            ]
        )
        == 0
    )
    ((source,), given) = sources[0]
    assert (str(source), given.pop("initialise"), given.pop("dtype")) == (
        "s",
        ("connector", "image_embeddings"),
        "bfloat16",
    )
    assert given.pop("variant") == "bf16"
    assert {name: str(path) for name, path in given.items()} == {
        "diffusion": "d",
        "ta_tok": "t.pth",
        "ta_tok_config": "t.json",
    }
    ((given_source, out, mesh), settings) = calls[0]
    assert given_source is opened and (str(out), settings) == ("o", {"overwrite": True})
    assert mesh == MeshConfig(data=1, fsdp=8, strategy="fsdp")
    printed = capsys.readouterr()
    assert (
        printed.err == "note: both are there\n"
        and "imported 0.80 GB of parameters into o in 2.0 s" in printed.out
    )
    assert "the largest tensor has 5.00 MB" in printed.out


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_verify(tmp_path, stub, ok, status):  # noqa: F811
    report = types.SimpleNamespace(ok=ok, to_dict=lambda: {"ok": ok})
    compared = stub("convert.verify", "verify", report)
    printed = stub("convert.report", "print_report")
    (tmp_path / "r.tmp").write_text("a file of the user's")
    assert cli.main([*VERIFY, "--parts=ar", "--seed=4", f"--out={tmp_path}/r.json"]) == status
    assert (
        compared[0][1]["parts"] == ("ar",)
        and compared[0][1]["seed"] == 4
        and compared[0][1]["ema"] is False
    )
    assert printed[0][0] == (report,) and json.loads((tmp_path / "r.json").read_text()) == {
        "ok": ok
    }
    assert (tmp_path / "r.tmp").read_text() == "a file of the user's"


@pytest.mark.parametrize("place", ["", "nowhere/r.json", "file/r.json"])
def test_verify_looks_at_out_before_it_compares_for_an_hour(tmp_path, stub, place, capsys):  # noqa: F811
    compared = stub("convert.verify", "verify", raises=UserError("compared"))
    stub("convert.report", "print_report")
    (tmp_path / "file").write_text("")
    assert cli.main([*VERIFY, f"--out={tmp_path / place}"]) == 2
    assert (
        capsys.readouterr().err
        == f"blip3o: error: --out={tmp_path / place} must be a file in a directory that is there\n"
    )
    assert not compared
    assert cli.main([*VERIFY, f"--out={tmp_path}/file"]) == 2 and len(compared) == 1


def test_bench_conversion(tmp_path, monkeypatch, stub):  # noqa: F811
    calls = stub("bench.conversion", "run", {"rows": {}})
    printed = []
    monkeypatch.setattr(
        sys.modules["blip3o_jax.bench.conversion"], "print_table", printed.append, raising=False
    )
    (tmp_path / "c.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/c.py", f"--out={tmp_path}/o", "--config.model.image_size=64"]
    assert cli.main(["bench", "conversion", *flags, "--dtype=float16"]) == 0
    ((model, out), settings) = calls[0]
    assert settings.pop("command").startswith("blip3o")
    assert (model.image_size, out, settings) == (64, tmp_path / "o", {"dtype": "float16"})
    assert printed == [{"rows": {}}]

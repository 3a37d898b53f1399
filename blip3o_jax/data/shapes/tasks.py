"""Write edits and questions of the shapes data set as webdataset shards next to the captioned
scenes.

edits_train_<count>.tar        KEY.png, KEY.input.png, KEY.json {"task": "edit", "instruction", ...}
questions_train_<count>.tar    KEY.input.png,
                               KEY.json {"task": "understand", "question", "answer", "kind"}
"""

import io
import json
import pathlib
import tarfile
from collections.abc import Iterator

from blip3o_jax import files
from blip3o_jax.data.shapes import edits, questions
from blip3o_jax.data.shapes.builder import encode_png, log
from blip3o_jax.data.shapes.draw import render

Members = Iterator[tuple[str, bytes]]


def prepare(
    directory: pathlib.Path, *, num_edits: int, num_questions: int, image_size: int, seed: int = 0
) -> dict[str, pathlib.Path]:
    """Write the shards that do not exist yet, each atomically; return {"edits": path, "questions":
    path} of the tasks with at least one example."""
    wanted = {"edits": (num_edits, _edits), "questions": (num_questions, _questions)}
    paths = {}
    for name, (count, members) in wanted.items():
        if not count:
            continue
        paths[name] = path = directory / f"{name}_train_{count}.tar"
        if not path.exists():
            with (
                files.replacing(path, "wb") as file,
                tarfile.open(fileobj=file, mode="w") as archive,
            ):
                for member, data in members(count, image_size, seed):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            log(f"wrote {path}")
    return paths


def _edits(count: int, image_size: int, seed: int) -> Members:
    for index in range(count):
        edit = edits.sample_edit(seed, index, "train")
        yield f"{edit.key}.input.png", encode_png(render(edit.before, image_size))
        yield f"{edit.key}.png", encode_png(render(edit.after, image_size))
        words = {"task": "edit", "instruction": edit.instruction, **edit.metadata}
        yield f"{edit.key}.json", json.dumps(words).encode()


def _questions(count: int, image_size: int, seed: int) -> Members:
    for index in range(count):
        asked = questions.sample_question(seed, index, "train")
        yield f"{asked.key}.input.png", encode_png(render(asked.scene, image_size))
        words = {
            "task": "understand",
            "question": asked.question,
            "answer": asked.answer,
            "kind": asked.kind,
        }
        yield f"{asked.key}.json", json.dumps(words).encode()

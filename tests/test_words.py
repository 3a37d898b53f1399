"""Hold names to the field's words: home-made ones stay out, and a name has one meaning.

Names are read as tokens, so that comments, docstrings and messages are free to use English words. A
keyword of a library (uvicorn's `host`) is no definition and is left alone.
"""

import ast
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "blip3o_jax").rglob("*.py")) + sorted((ROOT / "configs").glob("*.py"))
TESTS = [
    path for path in (ROOT / "tests").rglob("*.py") if path.name != pathlib.Path(__file__).name
]
TEXTS = [*PACKAGE, *TESTS, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
TEXTS += [path for path in (ROOT / "launch").iterdir() if path.is_file()]
# It lists the names that were replaced.
TEXTS.remove(ROOT / "docs" / "CHANGELOG.md")
PROSE = [*PACKAGE, *TESTS, *(path for path in (ROOT / "launch").iterdir() if path.is_file())]

# Home-made name -> the field's. No identifier, in the package, the configurations or the tests.
RENAMED = {
    "Begun": "RunContext",
    "Drawn": "SampleOutput, TrainingNoise or RolloutBatch",
    "Feed": "BatchIterator",
    "Judged": "RewardBatch",
    "OWN": "SUITES",
    "PARTS": "MODEL_PARTS, PUBLISHED_PARTS, ...",
    "Redrawn": "ReconstructionSource",
    "Setup": "RunContext",
    "Verdicts": "RewardBatch",
    "Words": "TextFields",
    "Written": "TextOutput",
    "after_prompts": "score_with_prefix",
    "agree": "check_consistent",
    "continued": "from_checkpoint",
    "data_wait": "data_wait_fraction",
    "draw_noise": "prepare_latents or sample_training_noise",
    "draw_tokens": "sample_image_tokens",
    "farewell": "notify_peers",
    "fitted": "match_to_plan",
    "for_each": "repeat_for_group",
    "going": "cond",
    "image_first": "image_token_offset",
    "image_rows": "image_embedding_init",
    "keep_programs": "set_compilation_cache",
    "kept_share": "valid_fraction",
    "max_bad_share": "max_bad_fraction",
    "null_beside": "uncond_latent_concat",
    "open_B": "active_B",
    "record_layers": "capture_intermediates",
    "reread": "teacher_forced_states",
    "row_keys": "sampling_keys or step_keys",
    "say": "log_host0",
    "shared_reading": "the shared prefix",
    "twin": "repeat_for_cfg",
    "useful_flops": "model_flops",
    "warmup_share": "warmup_fraction",
}
# Names that say nothing of the value. Tests may have them as local variables.
VAGUE = ("apart", "drawn", "feed", "guided", "judged", "most", "said", "spread", "told", "turns")
# Words that are no term of the field and have one, as a part of a name or in prose.
INFORMAL = {
    "beside": "next to, with, compared with, in addition to",
    "judged": "scored, checked",
    "tells": "reports, gives, identifies",
    "told": "reported, distinguished",
    "twin": "copy",
    "wants": "takes, needs",
}
# First words of docstrings whose first word is not the verb.
NO_VERBS = re.findall(
    r"\w+",
    "A Above After Also Although An And Are As At Before Both But By Each Errors Every Few Files"
    " First For From Greedy Half Host How However If In It Its Layers Neither No Not Of On One Or"
    " Outside Over Prompts Rows Saved Sent That The They This Those Three To Two Value Weights"
    " What Whatever When Where Whether Which Whose Wider With Written",
)
# Modules named after no subject of the field.
MODULES = ("apart", "drawing", "feed", "images_in", "judged", "start", "turns")
# Settings and metrics wherever they are written, code and pages alike.
SETTINGS = (
    r"\brl\.(updates|group|refill|stale|normalise|kl)\b",
    r"\b(warmup_share|max_bad_share|kept_share|image_rows|rl_kept_share)\b",
)
# Defined once in the whole package.
ONCE = (
    "Batch",
    "BatchIterator",
    "MODEL_PARTS",
    "PUBLISHED_PARTS",
    "Prompt",
    "RewardBatch",
    "RolloutBatch",
    "STAGES",
    "SampleOutput",
    "TextOutput",
    "TrainerSpec",
    "TrainingNoise",
    "guided_logits",
    "guided_velocity",
    "log_host0",
    "process_index",
)


def names(path: pathlib.Path) -> dict[str, int]:
    """Return the identifiers of a file, each with the first line that has it."""
    found: dict[str, int] = {}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                found.setdefault(token.string, token.start[0])
    return found


def definitions(path: pathlib.Path) -> list[str]:
    """Return the names that a file defines: of modules' and classes' bodies and of functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.append(node.name)
        for child in node.body if isinstance(node, ast.Module) else ():
            targets = (
                child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
            )
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found


def uses(paths: list[pathlib.Path], words: tuple[str, ...]) -> list[str]:
    """Return file:line of each first use of a word."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in paths
        for name, line in names(path).items()
        if name in words
    ]


def test_home_made_names_are_gone():
    found = uses([*PACKAGE, *TESTS], tuple(RENAMED))
    assert not found, [f"{use} ({RENAMED[use.rpartition(' ')[2]]})" for use in found]


def test_names_of_the_package_say_what_the_value_is():
    assert not uses(PACKAGE, VAGUE)


def test_names_have_no_informal_words():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} ({', '.join(INFORMAL[word] for word in words)})"
        for path in [*PACKAGE, *TESTS]
        for name, line in names(path).items()
        if (words := set(name.lower().split("_")) & INFORMAL.keys())
    ]
    assert not found


@pytest.mark.parametrize("word", INFORMAL)
def test_comments_docstrings_and_messages_have_no_informal_words(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        # A name of an HLO computation is data of its test.
        if re.search(rf"(?<!%)\b{word}\b", line, re.IGNORECASE)
    ]
    assert not found, INFORMAL[word]


@pytest.mark.parametrize("path", [*PACKAGE, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path):
    """Check against the words that begin a sentence of another kind, which is what went wrong."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "Nothing").split()[0]
            word = first.replace("-", "").rstrip(",:")
            if word in NO_VERBS or not word.isalpha() or word[0].islower():
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {first}")
    assert not found


def test_modules_are_named_after_their_subject():
    assert not [path for path in PACKAGE if path.stem in MODULES]


@pytest.mark.parametrize("pattern", SETTINGS)
def test_settings_and_metrics_have_the_fields_names(pattern):
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in TEXTS
        if (match := re.search(pattern, path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.fixture(scope="module")
def defined() -> dict[str, list[str]]:
    """Return every name that the package defines, with its files."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE:
        for name in definitions(path):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("name", ONCE)
def test_one_name_has_one_meaning(defined, name):
    assert len(defined.get(name, ())) == 1, defined.get(name)


def test_hosts_are_processes_as_in_jax(defined):
    assert not {"host", "hosts"} & defined.keys()

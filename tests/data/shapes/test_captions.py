import collections
import json

import pytest

from blip3o_jax.data.shapes import captions, scene, scorer, vocabulary


def test_captions_are_varied_short_and_true() -> None:
    starts = collections.defaultdict(set)
    for index in range(2_100):
        drawn = scene.sample(0, index, "train")
        caption, metadata = captions.describe(drawn)
        assert captions.describe(drawn) == (caption, metadata)
        assert len(caption.split()) <= 16 and "None" not in caption and "{" not in caption
        assert "crosss" not in caption
        assert metadata["category"] == drawn.category
        assert json.loads(json.dumps(metadata)) == metadata
        assert scorer.satisfies(drawn, metadata)
        for asked in metadata["objects"]:
            named = captions.plural(asked["shape"]) if asked["count"] > 1 else asked["shape"]
            assert all(
                word in caption for word in (named, asked["colour"] or "", asked["size"] or "")
            )
        if metadata["word"]:
            assert f'"{metadata["word"]}"' in caption
        starts[drawn.category].add(
            caption.replace('"', "").split(" ")[0] + str(len(caption.split()))
        )
    assert all(len(captions.TEMPLATES[category]) >= 6 for category in vocabulary.CATEGORIES)
    assert all(len(set(templates)) == len(templates) for templates in captions.TEMPLATES.values())
    assert all(len(kinds) >= 3 for kinds in starts.values())


def test_converse_relations_name_the_objects_the_other_way_round() -> None:
    asked = collections.Counter()
    for index in range(4, 1_400, 7):
        drawn = scene.sample(0, index, "train")
        metadata = captions.describe(drawn)[1]
        shapes = [asked_object["shape"] for asked_object in metadata["objects"]]
        assert (
            vocabulary.fact_of_position(shapes[0], metadata["relation"], shapes[1]) == drawn.asked
        )
        asked[metadata["relation"]] += 1
    assert min(asked[relation] for relation in vocabulary.RELATIONS) >= 25


@pytest.mark.parametrize("split", scene.SPLITS)
def test_prompts_are_balanced_and_those_of_their_split(split: str) -> None:
    prompts = captions.prompts(split, 70, seed=2)
    assert set(collections.Counter(prompt["category"] for prompt in prompts).values()) == {10}
    for index, prompt in enumerate(prompts):
        caption, metadata = captions.describe(scene.sample(2, index, split))
        assert prompt["caption"] == caption and metadata.items() <= prompt.items()
    assert prompts == captions.prompts(split, 70, seed=2) != captions.prompts(split, 70, seed=3)

import numpy as np

from blip3o_jax.evaluation import nearest


def test_the_nearest_picture_and_its_distance(rng):
    pictures = rng.integers(0, 256, (20, 4, 6, 3), dtype=np.uint8)
    images = pictures[[7, 0, 19]].copy()
    images[0, 0, 0, 0] ^= 16  # one value of 72 differs by 16
    which, distance = nearest.nearest(images, pictures)
    assert which.tolist() == [7, 0, 19]
    np.testing.assert_allclose(distance, [16 / 72**0.5, 0, 0], atol=0.05)
    errors = nearest.squared_errors(images, pictures)
    apart = images[:, None].astype(float) - pictures[None]
    np.testing.assert_allclose(errors, (apart**2).mean(axis=(2, 3, 4)), rtol=1e-4, atol=2e-3)


def test_matched_samples_are_nearest_to_their_own_picture(rng):
    truths = rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    assert nearest.matched(truths // 2 + 60, truths).all()
    assert not nearest.matched(np.roll(truths, 1, axis=0), truths, choices=30).any()
    # Samples that have nothing to do with the captions are right by chance.
    noise = rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    assert np.mean([nearest.matched(noise, truths, seed=s).mean() for s in range(20)]) < 0.3
    assert nearest.matched(truths[:3], truths[:3]).all()  # fewer pictures than choices

"""The pixel judge of the built-in model, and the held-out list, checked on rendered scenes."""

import random
import subprocess
import sys

import numpy as np
import pytest

from stepfuse.examples.shapes.judge import altered, judge, look, self_test
from stepfuse.examples.shapes.render import render
from stepfuse.examples.shapes.scenes import (
    all_combinations,
    caption,
    choose_heldout,
    load_heldout,
    mirrored,
    pair,
    sample_pair,
    sample_single,
    single,
)


def test_rendered_truths_are_right_and_wrong_captions_refused() -> None:
    right, wrong = self_test(600, seed=3)
    assert right >= 0.99
    assert wrong <= 0.01


def test_every_aspect_can_be_wrong_alone() -> None:
    rng = random.Random(1)
    scene = pair(rng, ("red", "circle", "above", "blue", "square"), "white")
    (image,) = render([scene]).transpose(0, 2, 3, 1)
    wrong = {
        "background": pair(rng, ("red", "circle", "above", "blue", "square"), "gray"),
        "count": single(rng, "red", "circle", "white"),
        "colors": pair(rng, ("red", "circle", "above", "green", "square"), "white"),
        "shapes": pair(rng, ("red", "circle", "above", "blue", "triangle"), "white"),
        "relation": pair(rng, ("red", "circle", "below", "blue", "square"), "white"),
    }
    assert judge(image, scene).right
    for aspect, other in wrong.items():
        verdict = judge(image, other)
        assert not getattr(verdict, aspect)
        assert not verdict.right


def test_sizes_and_places_of_single_objects() -> None:
    rng = random.Random(2)
    small, left = single(rng, "red", "square", "white", size="small"), single(rng, "red", "square", "white", "left")
    images = render([small, left]).transpose(0, 2, 3, 1)
    assert judge(images[0], small).size
    assert not judge(images[0], single(rng, "red", "square", "white", size="large")).size
    assert judge(images[1], left).right
    assert not judge(images[1], single(rng, "red", "square", "white", "right")).relation


def test_noise_and_blank_pictures_are_not_accepted() -> None:
    rng = random.Random(4)
    scenes = [sample_single(rng) if i % 2 else sample_pair(rng) for i in range(50)]
    noise = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    assert not any(judge(noise, scene).right for scene in scenes)
    assert not any(judge(np.ones((64, 64, 3), np.float32), scene).right for scene in scenes)
    assert look(np.ones((64, 64, 3), np.float32)) == ("white", [])


def test_a_wrong_image_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="64x64"):
        judge(np.zeros((32, 32, 3), np.float32), sample_single(random.Random(0)))


def test_altered_scenes_differ_in_their_caption() -> None:
    rng = random.Random(5)
    for _ in range(200):
        scene = sample_pair(rng)
        assert caption(altered(scene, rng)) != caption(scene)


def test_heldout_list_is_the_committed_one_closed_under_mirroring_and_never_sampled() -> None:
    heldout = load_heldout()
    assert heldout == frozenset(choose_heldout())
    assert abs(len(heldout) / len(all_combinations()) - 0.15) < 0.005
    assert {mirrored(c) for c in heldout} == heldout
    rng = random.Random(6)
    sampled = [sample_pair(rng, heldout).combination for _ in range(3000)]
    assert not any(c in heldout for c in sampled)
    assert any(sample_pair(rng).combination in heldout for _ in range(200))


def test_the_judge_imports_nothing_of_the_engine() -> None:
    code = (
        "import sys, stepfuse.examples.shapes.judge\n"
        "sys.exit(any(m == 'torch' or m.startswith('stepfuse.engine') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Textual inversion: every file format, the encoders' states against diffusers, and removal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepfuse.engine.conditioning.text import TextEncoder, encode_prompts
from stepfuse.engine.conditioning.textual_inversion import (
    Embedding,
    TextualInversions,
    parse_embeddings,
    read_embeddings,
)
from stepfuse.engine.config import EngineConfig
from stepfuse.engine.errors import CheckpointError, NumericsError, RequestError
from stepfuse.engine.loading import load_components

Pipeline = Callable[[str], Path]
PROMPTS = ["a <cat-toy> on a table", "mystyle, photo <cat-toy>", "a cat"]


def vectors(n: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoders(reference_pipeline: Pipeline) -> Callable[[str], tuple[TextEncoder, ...]]:
    made: dict[str, tuple[TextEncoder, ...]] = {}

    def get(name: str) -> tuple[TextEncoder, ...]:
        if name not in made:
            made[name] = load_components(reference_pipeline(name), EngineConfig(device="cpu")).text
        return made[name]

    return get


def states(encoders: Sequence[TextEncoder], prompts: Sequence[str] = PROMPTS, skip: int | None = None):
    return encode_prompts(encoders, [[p] * len(encoders) for p in prompts], skip)


def digest(encoders: Sequence[TextEncoder]) -> str:
    h = hashlib.sha256()
    for encoder in encoders:
        for key, tensor in sorted(encoder.model.state_dict().items()):
            h.update(key.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        h.update(repr(sorted(encoder.tokenizer.get_vocab().items())).encode())
    return h.hexdigest()


def test_every_format_of_file(tmp_path: Path) -> None:
    def read(tensors: dict[str, Tensor], token: str | None = None) -> list[tuple[str, dict[str, int]]]:
        save_file(tensors, tmp_path / "my-style.safetensors")
        found = read_embeddings(tmp_path / "my-style.safetensors", token)
        return [(one.token, {key: len(t) for key, t in one.vectors.items()}) for one in found]

    assert read({"emb_params": vectors(3, 0)}) == [("my-style", {"": 3})]
    assert read({"emb_params": vectors(3, 0)}, "<s>") == [("<s>", {"": 3})]
    assert read({"clip_l": vectors(2, 0), "clip_g": vectors(2, 1)}) == [("my-style", {"clip_g": 2, "clip_l": 2})]
    assert read({"<cat-toy>": vectors(1, 0)[0]}) == [("<cat-toy>", {"": 1})]
    assert read({"<cat-toy>": vectors(4, 0)}, "<dog>") == [("<dog>", {"": 4})]
    assert sorted(read({"<a>": vectors(1, 0), "<b>": vectors(2, 0)})) == [("<a>", {"": 1}), ("<b>", {"": 2})]


@pytest.mark.parametrize(
    ("tensors", "token", "message"),
    [
        ({}, None, "got the keys none"),
        ({"emb_params": torch.zeros(1, 4), "<a>": torch.zeros(1, 4)}, None, "keys <a>, emb_params"),
        ({"<b>": torch.zeros(1, 4), "<a>": torch.zeros(1, 4)}, "<c>", "one embedding to be renamed"),
        ({"<a>": torch.zeros(1, 1, 4)}, None, r"<a> \[1, 1, 4\]"),
    ],
)
def test_what_is_no_embedding(tensors: dict, token: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_embeddings("x", tensors, token)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="<a>"):
        parse_embeddings("x", {"<a>": torch.full((4,), float("nan"))})
    (tmp_path / "x.pt").write_bytes(b"no")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for name, message in (("x.pt", "pickled"), ("x.safetensors", "not a safetensors"), ("y.safetensors", "no such")):
        with pytest.raises(CheckpointError, match=message):
            read_embeddings(tmp_path / name)


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_states_equal_diffusers(encoders, reference_pipeline: Pipeline, name: str, skip: int | None) -> None:
    """One vector and several, together with clip_skip."""
    several = encoders(name)
    one, many = ([vectors(n, 10 * n + i) for i in range(len(several))] for n in (1, 3))
    keys = [""] if name == "sd15" else ["clip_l", "clip_g"]
    added = TextualInversions(several)
    added.set(
        [
            Embedding("<cat-toy>", dict(zip(keys, many, strict=True))),
            Embedding("mystyle", dict(zip(keys, one, strict=True))),
        ]
    )
    found = states(several, skip=skip)
    added.set([])
    pipe = diffusers.DiffusionPipeline.from_pretrained(reference_pipeline(name), torch_dtype=torch.float32)
    theirs = [(pipe.tokenizer, pipe.text_encoder)]
    if name == "sdxl":
        theirs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    for (tokenizer, model), a, b in zip(theirs, many, one, strict=True):
        pipe.load_textual_inversion({"<cat-toy>": a}, tokenizer=tokenizer, text_encoder=model)
        pipe.load_textual_inversion({"mystyle": b}, tokenizer=tokenizer, text_encoder=model)
        # The published eos_token_id of 2 makes transformers summarise at the largest id, here an added word.
        getattr(model, "text_model", model).eos_token_id = tokenizer.eos_token_id
        if not hasattr(model, "text_model"):
            object.__setattr__(model, "text_model", model)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        expected = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=skip
        )
        assert (ours.hidden - expected[0]).abs().max() <= 1e-5 * expected[0].abs().max(), prompt
        if name == "sdxl":
            assert (ours.pooled - expected[2]).abs().max() <= 1e-5 * expected[2].abs().max(), prompt


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_removing_restores_tables_and_tokenizers(encoders, name: str) -> None:
    several = encoders(name)
    keys = [""] if name == "sd15" else ["clip_l", "clip_g"]
    before, tables = digest(several), [e.model.get_input_embeddings().weight for e in several]
    plain, added = states(several), TextualInversions(several)

    def word(token: str, n: int) -> Embedding:
        return Embedding(token, {key: vectors(n, n) for key in keys})

    added.set([word("<cat-toy>", 2)])
    first = states(several)
    assert not torch.equal(first[0].hidden, plain[0].hidden)
    assert torch.equal(first[2].hidden, plain[2].hidden), "a prompt without the word changed"
    added.set([word("mystyle", 1), word("<cat-toy>", 2)])
    assert added.active == ("mystyle", "<cat-toy>")
    assert torch.allclose(states(several)[0].hidden, first[0].hidden, atol=1e-6)
    added.set([])
    assert digest(several) == before
    assert all(e.model.get_input_embeddings().weight is t for e, t in zip(several, tables, strict=True))
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(states(several), plain, strict=True))
    assert added.active == ()


def test_words_are_found_by_their_own_rules_with_weights_and_at_the_end_of_chunks(encoders) -> None:
    (encoder,) = encoders("sd15")
    added = TextualInversions([encoder])
    added.set([Embedding("<Toy>", {"": vectors(3, 1)}), Embedding("mystyle", {"": vectors(1, 2)})])
    toy, style = (encoder.vectors[encoder.tokenizer.convert_tokens_to_ids(word)] for word in ("<Toy>", "mystyle"))
    assert (len(toy), len(style)) == (3, 1)
    assert len({*toy, *style}) == 4

    def ids(prompt: str) -> list[tuple[int, ...]]:
        return [chunk.ids for chunk in encoder.chunks(prompt)]

    (chunk,) = encoder.chunks("a(<toy>:1.5)")
    assert chunk.ids[1:] == toy
    assert chunk.weights[1:] == (1.5, 1.5, 1.5)
    assert ids("MyStyle.")[0][0] == style[0]
    assert style[0] not in ids("mystyles")[0]
    first, second = ids("a " * 73 + "<toy>")
    assert len(first) == 73, "the vectors of a word were torn apart"
    assert second == toy
    added.set([])
    assert encoder.vectors == {}


def test_misfits_change_nothing(encoders) -> None:
    sd, sdxl = encoders("sd15"), encoders("sdxl")
    before = digest([*sd, *sdxl])
    both = {"clip_l": vectors(1, 0), "clip_g": vectors(1, 1)}
    for several, embedding, message in (
        (sd, Embedding("<s>", {"": torch.zeros(1, 48)}), r"got vectors \[1, 48\]; expected vectors \[n, 32\]"),
        (sd, Embedding("<s>", {"": torch.zeros(76, 32)}), "n up to 75"),
        (sd, Embedding("<s>", both), r"clip_l \[1, 32\], clip_g \[1, 32\]; expected vectors"),
        (sdxl, Embedding("<s>", {"": vectors(1, 0)}), r"expected clip_l \[n, 32\]"),
        (sdxl, Embedding("<s>", {"clip_l": vectors(1, 0)}), r"expected clip_g .* encoder 2 of 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TextualInversions(several).set([embedding])
    for words, message in (
        (["cat"], "knows already"),
        (["<s>", "<S>"], "every word once"),
        (["(s)"], "without any of"),
        ([" s"], "without spaces at its ends"),
        ([""], "without spaces"),
    ):
        with pytest.raises(RequestError, match=message):
            TextualInversions(sd).set([Embedding(word, {"": vectors(1, 0)}) for word in words])
    assert digest([*sd, *sdxl]) == before


def test_an_exported_text_encoder_has_no_table_to_extend(encoders) -> None:
    exported = replace(encoders("sd15")[0], model=torch.nn.Identity())
    with pytest.raises(RequestError, match="exported text encoder's table is fixed"):
        TextualInversions([exported]).set([Embedding("<s>", {"": vectors(1, 0)})])

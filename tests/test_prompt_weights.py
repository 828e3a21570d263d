"""Prompt weights, BREAK and long prompts: the parser, how chunks fill, and what the encoder's states become."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfuse.engine.conditioning.prompt_weights import Chunk, Span, parse_prompt, split_tokens
from stepfuse.engine.conditioning.text import TextEncoder, Tokens, encode_prompts, join, pad_prompts
from stepfuse.engine.config import EngineConfig
from stepfuse.engine.errors import RequestError
from stepfuse.engine.loading import load_components

COMMA = 1


def spans(prompt: str) -> list[list[tuple[str, float]]]:
    return [[(span.text, round(span.weight, 10)) for span in section] for section in parse_prompt(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # the examples in the documentation of A1111's parse_prompt_attention
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # ours
        ("(word:1.3)", [("word", 1.3)]),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 0.9090909091)]),
        ("(a: -0.5 )", [("a", -0.5)]),
        ("(a:.5)", [("a", 0.5)]),
        ("a smile :) at 12:30", [("a smile :) at 12:30", 1.0)]),
        ("price: 1.5) or ]", [("price: 1.5) or ]", 1.0)]),
        ("C:\\dir \\\\ x", [("C:\\dir \\ x", 1.0)]),
        ("", []),
        ("()", []),
    ],
)
def test_known_prompts(prompt: str, expected: list) -> None:
    assert spans(prompt) == [expected]


def test_break_ends_a_section_also_inside_brackets() -> None:
    assert spans("a  BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert spans("(a BREAK b:2) c") == [[("a", 2.0)], [("b", 2.0), (" c", 1.0)]]
    assert spans("BREAK a BREAK") == [[], [("a", 1.0)], []]
    assert spans("OUTBREAK BREAKS break") == [[("OUTBREAK BREAKS break", 1.0)]]


def test_weights_that_are_no_numbers() -> None:
    with pytest.raises(RequestError, match=r"got the weight '1\.2\.3', expected a number as in \(word:1\.3\)"):
        parse_prompt("(a:1.2.3)")
    with pytest.raises(RequestError, match="multiply to inf"):
        parse_prompt(f"(({'a'}:{'9' * 300}):{'9' * 300})")


WORDS = st.text(st.characters(exclude_characters="()[]\\:", exclude_categories=["Cs"]), min_size=1, max_size=8)
TEXTS = WORDS.filter(lambda text: "BREAK" not in text)
WEIGHTS = st.integers(1, 400).map(lambda n: n / 100)
TREES = st.recursive(
    TEXTS,
    lambda inner: (
        st.tuples(st.sampled_from(["()", "[]"]), st.lists(inner, max_size=4))
        | st.tuples(WEIGHTS, st.lists(inner, max_size=4))
    ),
    max_leaves=12,
)


def write(tree) -> str:
    if isinstance(tree, str):
        return tree
    kind, children = tree
    inside = "".join(map(write, children))
    return f"({inside}:{kind})" if isinstance(kind, float) else f"{kind[0]}{inside}{kind[1]}"


def leaves(tree, weight: float = 1.0) -> list[tuple[str, float]]:
    if isinstance(tree, str):
        return [(tree, weight)]
    kind, children = tree
    factor = kind if isinstance(kind, float) else {"()": 1.1, "[]": 1 / 1.1}[kind]
    return [leaf for child in children for leaf in leaves(child, weight * factor)]


@settings(max_examples=200, deadline=None)
@given(st.lists(TREES, max_size=4))
def test_nested_weights_multiply(trees: list) -> None:
    """A tree of brackets, written out and parsed: every character has the product of the weights around it."""
    (section,) = parse_prompt("".join(map(write, trees)))
    found = [(c, span.weight) for span in section for c in span.text]
    expected = [(c, weight) for tree in trees for text, weight in leaves(tree) for c in text]
    assert [c for c, _ in found] == [c for c, _ in expected]
    assert all(math.isclose(a, b, rel_tol=1e-9) for (_, a), (_, b) in zip(found, expected, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab ()[]\\:.,1-+BREAK\n"), max_size=40))
def test_any_text_is_read_or_refused_clearly(prompt: str) -> None:
    try:
        sections = parse_prompt(prompt)
    except RequestError:
        assert re.search(r":\s*[+-]?[.\d]+\s*\)", prompt), "refused without a weight in it"
        return
    for section in sections:
        assert all(span.text and math.isfinite(span.weight) for span in section)
        assert all(a.weight != b.weight for a, b in pairwise(section))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40).filter(lambda text: "BREAK" not in text))
def test_escaped_text_comes_back(text: str) -> None:
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert parse_prompt(escaped) == ((Span(text),),) if text else ((),)
    assert parse_prompt(f"({escaped}:1.5)") == ((Span(text, 1.5),),) if text else ((),)


@pytest.mark.parametrize("prompt", ["a cat", "a cat, b: c) ]", "1:2", "back\\slash", "  two  spaces ", "(", "[", "()"])
def test_a_prompt_without_syntax_is_itself(prompt: str) -> None:
    plain = "".join(c for c in prompt if c not in "([") if prompt in ("(", "[") else prompt
    assert parse_prompt(prompt) == (((Span(plain),),) if plain not in ("", "()") else ((),))


UNITS = st.lists(
    st.tuples(st.just((COMMA,)) | st.lists(st.integers(2, 99), min_size=1, max_size=4).map(tuple), WEIGHTS), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(st.lists(UNITS, min_size=1, max_size=3), st.integers(4, 30))
def test_chunks_hold_every_token_in_order(sections: list, size: int) -> None:
    chunks = split_tokens(sections, size, COMMA)
    assert chunks
    assert all(len(chunk.ids) == len(chunk.weights) <= size for chunk in chunks)
    tokens = [(token, weight) for section in sections for unit, weight in section for token in unit]
    assert [pair for chunk in chunks for pair in zip(chunk.ids, chunk.weights, strict=True)] == tokens
    assert len(chunks) >= math.ceil(len(tokens) / size)


def test_a_chunk_ends_after_its_last_comma_if_that_is_near() -> None:
    def sizes(*tokens: int) -> list[int]:
        return [len(chunk.ids) for chunk in split_tokens([[((t,), 1.0) for t in tokens]], 75, COMMA)]

    word = [7]
    assert sizes(*word * 75) == [75]
    assert sizes(*word * 76) == [75, 1]
    assert sizes(*word * 55, COMMA, *word * 24) == [56, 24]
    assert sizes(*word * 54, COMMA, *word * 25) == [75, 5]
    assert sizes(*word * 74, COMMA, *word * 3) == [75, 3]
    assert sizes(*word * 60, COMMA, *word * 14, COMMA, 7) == [75, 2]  # the comma itself moves nothing
    breaks = split_tokens([[], [((5,), 2.0)], []], 75, COMMA)
    assert breaks == [Chunk((), ()), Chunk((5,), (2.0,))]
    together = split_tokens([[((7,), 1.0)] * 73 + [((2, 3, 4), 1.5)]], 75, COMMA)
    assert [len(chunk.ids) for chunk in together] == [73, 3]
    with pytest.raises(RequestError, match="80 vectors does not fit"):
        split_tokens([[(tuple(range(80)), 1.0)]], 75, COMMA)


@pytest.fixture(scope="module")
def encoders(reference_pipeline: Callable[[str], Path]) -> Callable[[str], tuple[TextEncoder, ...]]:
    made: dict[str, tuple[TextEncoder, ...]] = {}

    def get(name: str) -> tuple[TextEncoder, ...]:
        if name not in made:
            made[name] = load_components(reference_pipeline(name), EngineConfig(device="cpu")).text
        return made[name]

    return get


def tokens_of(encoder: TextEncoder, prompts: list[str]) -> Tokens:
    """What the tokenizer's own call makes of prompts, cut and padded to the encoder's length."""
    with_ends = encoder.tokenizer(prompts, max_length=77, truncation=True, padding="max_length", return_tensors="pt")
    return Tokens(with_ends.input_ids, with_ends.attention_mask)


def plain(encoders: tuple[TextEncoder, ...], prompts: list[str], skip: int | None = None):
    return join([encoder.encode(tokens_of(encoder, prompts), skip) for encoder in encoders])


@pytest.mark.parametrize(
    "prompt", ["", " ", "a photo of a cat", "a, b; it's 2024 <x> ñ 猫", "a " * 75, "a " * 76 + "end"]
)
def test_tokens_are_those_of_the_tokenizers_own_call(encoders, prompt: str) -> None:
    (encoder,) = encoders("sd15")
    expected = tokens_of(encoder, [prompt, "x"])
    first, *rest = encoder.chunks(prompt)
    found = encoder.pack([first, *encoder.chunks("x")])
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)
    assert len(rest) == (prompt.count("a ") > 75)


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl"])
def test_without_syntax_every_bit_is_as_before(encoders, name: str, skip: int | None) -> None:
    prompts = ["a photo of a cat", "", "back\\slash: 1) ] a", "a " * 75]
    expected = plain(encoders(name), prompts, skip)
    found = encode_prompts(encoders(name), [[p] * len(encoders(name)) for p in prompts], skip)
    assert torch.equal(torch.cat([one.hidden for one in found]), expected.hidden)
    if expected.pooled is None:
        assert all(one.pooled is None for one in found)
    else:
        assert torch.equal(torch.cat([one.pooled for one in found]), expected.pooled)


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_weights_scale_the_states_and_keep_their_mean(encoders, name: str, skip: int | None) -> None:
    """By hand, per encoder and in float64: states times weights, times the old mean over the new."""
    prompt, text = "a (red:1.5) cat [x]", "a red cat x"
    weights = torch.ones(77, dtype=torch.float64)
    parts, raw = [], []
    for encoder in encoders(name):
        one = encoder.encode(tokens_of(encoder, [text]), skip).hidden[0].double()
        ids = encoder.tokenizer("red", add_special_tokens=False).input_ids
        a = len(encoder.tokenizer("a", add_special_tokens=False).input_ids)
        cat = len(encoder.tokenizer("cat", add_special_tokens=False).input_ids)
        weights[1 + a : 1 + a + len(ids)] = 1.5
        weights[1 + a + len(ids) + cat] = 1 / 1.1
        scaled = one * weights[:, None]
        raw.append(scaled)
        parts.append(scaled * (one.mean() / scaled.mean()))
    texts = [[prompt] * len(parts)]
    (found,) = encode_prompts(encoders(name), texts, skip)
    expected = torch.cat(parts, -1)
    assert (found.hidden[0] - expected).abs().max() <= 2e-5 * expected.abs().max()
    _, beside = encode_prompts(encoders(name), [["x, x BREAK y"] * len(parts), texts[0]], skip)
    assert (beside.hidden - found.hidden).abs().max() <= 2e-5 * expected.abs().max(), "the neighbour shows"
    (unscaled,) = encode_prompts(encoders(name), texts, skip, restore_mean=False)
    assert (unscaled.hidden[0] - torch.cat(raw, -1)).abs().max() <= 1e-6 * torch.cat(raw, -1).abs().max()
    unweighted = plain(encoders(name), [text], skip).pooled
    assert (found.pooled is None) if unweighted is None else torch.allclose(found.pooled, unweighted, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_long_prompts_are_chunks_side_by_side(encoders, name: str) -> None:
    """Each chunk as its own prompt; pooled is the first chunk's, the shorter of two prompts gets empty chunks."""
    several = encoders(name)
    long, short = "a " * 75 + "cat b", "x BREAK y"
    found = encode_prompts(several, [[long] * len(several), ["x"] * len(several), [short] * len(several)], None)
    chunks = ["a " * 75, "cat b", "x", "y"]
    alone = plain(several, chunks)
    assert [one.hidden.shape[1] for one in found] == [154, 77, 154]
    assert torch.allclose(found[0].hidden[0], alone.hidden[:2].flatten(0, 1), atol=1e-5)
    assert torch.allclose(found[1].hidden, alone.hidden[2:3], atol=1e-5)
    assert torch.allclose(found[2].hidden[0], alone.hidden[2:].flatten(0, 1), atol=1e-5)
    if name == "sdxl":
        for one, row in zip(found, (0, 2, 2), strict=True):
            assert torch.allclose(one.pooled[0], alone.pooled[row], atol=1e-5)
        (uneven,) = encode_prompts(several, [["x", long]], None)
        first, second = (
            plain((encoder,), texts) for encoder, texts in zip(several, (["x", ""], chunks[:2]), strict=True)
        )
        expected = torch.cat([first.hidden, second.hidden], -1).flatten(0, 1)
        assert torch.allclose(uneven.hidden[0], expected, atol=1e-5)


def test_prompts_of_several_lengths_are_padded_and_counted(encoders) -> None:
    several = encoders("sd15")
    long, short = encode_prompts(several, [["x BREAK y"], ["x"]], None)
    hidden, lengths = pad_prompts([long, short])
    assert lengths is not None
    assert lengths.tolist() == [154, 77]
    assert lengths.dtype == torch.int32
    assert torch.equal(hidden[1, :77], short.hidden[0])
    assert not hidden[1, 77:].any()
    same, none = pad_prompts([short, short])
    assert none is None
    assert torch.equal(same, torch.cat([short.hidden, short.hidden]))


def test_the_denoiser_sees_a_padded_prompt_as_the_prompt_alone(reference_pipeline: Callable[[str], Path]) -> None:
    from stepfuse.engine.models.unet import Conditioning

    parts = load_components(reference_pipeline("sd15"), EngineConfig(device="cpu"))
    encoded = encode_prompts(parts.text, [["x BREAK y"], ["a cat"]], None)
    hidden, lengths = pad_prompts(encoded)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at, t = torch.zeros(2, dtype=torch.int64), torch.full((2, 1), 500.0)
    unet = parts.denoiser
    together = unet(latents, unet.prepare(Conditioning(hidden=hidden, kv_len=lengths), t), at)
    for i, one in enumerate(encoded):
        alone = unet(latents[i : i + 1], unet.prepare(Conditioning(hidden=one.hidden), t[:1]), at[:1])
        assert (together[i] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()

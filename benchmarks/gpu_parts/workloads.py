"""The matrix products, convolutions and attentions of real models, with how often each occurs in one evaluation.

U-Nets are walked block by block (tests compare the walk with the published graph); transformers are uniform and are
listed by formula. Sizes are those of one row at the model's own resolution; `rows` multiplies M and the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

TEXT = 77  # tokens of a CLIP prompt


@dataclass(frozen=True, order=True)
class Gemm:
    """[M, K] @ [K, N] for one row; `per_row=False` when M is the number of rows (embeddings)."""

    m: int
    n: int
    k: int
    per_row: bool = True


@dataclass(frozen=True, order=True)
class Conv:
    """Convolution of [1, c_in, size, size] with [c_out, c_in, kernel, kernel]; `upsampled`: its input was doubled."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    size: int
    upsampled: bool = False


@dataclass(frozen=True, order=True)
class Attention:
    """Softmax attention of `length` queries over `keys` keys, `heads` heads of width `width`."""

    heads: int
    width: int
    length: int
    keys: int


Site = Gemm | Conv | Attention


@dataclass(frozen=True)
class UNetShape:
    """What the shapes of a Stable Diffusion U-Net depend on; `depths` are transformer layers per level (0: none)."""

    size: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    context: int
    linear_projection: bool
    mid_depth: int

    def sites(self) -> Iterator[Site]:
        levels = len(self.channels)
        time = 4 * self.channels[0]
        size, skips, width = self.size, [self.channels[0]], self.channels[0]
        yield Gemm(1, time, self.channels[0], per_row=False)
        yield Gemm(1, time, time, per_row=False)
        yield Conv(4, width, 3, 1, size)
        for level, out in enumerate(self.channels):
            for _ in range(2):
                yield from _resnet(width, out, size, time)
                yield from self._transformer(level, self.depths[level], size)
                width = out
                skips.append(width)
            if level < levels - 1:
                yield Conv(width, width, 3, 2, size)
                size //= 2
                skips.append(width)
        yield from _resnet(width, width, size, time)
        yield from self._transformer(levels - 1, self.mid_depth, size)
        yield from _resnet(width, width, size, time)
        for level in reversed(range(levels)):
            out = self.channels[level]
            for _ in range(3):
                yield from _resnet(width + skips.pop(), out, size, time)
                yield from self._transformer(level, self.depths[level], size)
                width = out
            if level:
                size *= 2
                yield Conv(width, width, 3, 1, size, upsampled=True)
        yield Conv(width, 4, 3, 1, size)

    def _transformer(self, level: int, depth: int, size: int) -> Iterator[Site]:
        if not depth:
            return
        width, heads, tokens = self.channels[level], self.heads[level], size * size
        for _ in range(2):  # in and out
            if self.linear_projection:
                yield Gemm(tokens, width, width)
            else:
                yield Conv(width, width, 1, 1, size)
        for _ in range(depth):
            for _ in range(6):  # q, k, v, out of self-attention; q, out of cross-attention
                yield Gemm(tokens, width, width)
            for _ in range(2):  # k, v of the prompt
                yield Gemm(TEXT, width, self.context)
            yield Attention(heads, width // heads, tokens, tokens)
            yield Attention(heads, width // heads, tokens, TEXT)
            yield Gemm(tokens, 8 * width, width)
            yield Gemm(tokens, width, 4 * width)


def _resnet(c_in: int, c_out: int, size: int, time: int) -> Iterator[Site]:
    yield Conv(c_in, c_out, 3, 1, size)
    yield Gemm(1, c_out, time, per_row=False)
    yield Conv(c_out, c_out, 3, 1, size)
    if c_in != c_out:
        yield Conv(c_in, c_out, 1, 1, size)


@dataclass(frozen=True)
class TransformerShape:
    """A uniform transformer with fused q, k, v: joint blocks over image and text tokens, then single-stream blocks."""

    width: int
    heads: int
    image: int
    text: int
    joint: int
    single: int = 0

    def sites(self) -> Iterator[Site]:
        tokens, width = self.image + self.text, self.width
        for _ in range(self.joint):
            for stream in (self.image, self.text) if self.text else (self.image,):
                yield Gemm(stream, 3 * width, width)
                yield Gemm(stream, width, width)
                yield Gemm(stream, 4 * width, width)
                yield Gemm(stream, width, 4 * width)
            yield Attention(self.heads, width // self.heads, tokens, tokens)
        for _ in range(self.single):  # attention and feed-forward side by side (Flux)
            yield Gemm(tokens, 7 * width, width)
            yield Gemm(tokens, width, 5 * width)
            yield Attention(self.heads, width // self.heads, tokens, tokens)


MODELS: dict[str, UNetShape | TransformerShape] = {
    "sdxl": UNetShape(128, (320, 640, 1280), (0, 2, 10), (5, 10, 20), 2048, True, 10),
    "sd15": UNetShape(64, (320, 640, 1280, 1280), (1, 1, 1, 0), (8, 8, 8, 8), 768, False, 1),
    "flux": TransformerShape(3072, 24, 4096, 512, joint=19, single=38),
    "sd3-medium": TransformerShape(1536, 24, 4096, 333, joint=24),
    "dit-xl-2": TransformerShape(1152, 16, 256, 0, joint=28),
}
TINY = {"tiny": UNetShape(8, (32, 64), (0, 1), (1, 2), 32, True, 1)}

# d = 512 is the single head of the autoencoder's middle block; 40, 80, 160 are SD 1.5, 72 DiT-XL/2, 128 Flux.
EXTRA_ATTENTION = {"vae": Attention(1, 512, 16384, 16384), "vae-512": Attention(1, 512, 4096, 4096)}


def counted(model: str, kind: type[Site], *, tiny: bool = False) -> Counter[Site]:
    """Distinct sites of one kind in one evaluation of `model`, with their counts."""
    table = TINY if tiny else MODELS
    return Counter(site for site in table[model].sites() if isinstance(site, kind))


def flops(site: Site, rows: int = 1) -> float:
    """Floating-point operations of a site for `rows` rows; a multiply-add counts two."""
    if isinstance(site, Gemm):
        return 2.0 * site.m * rows * site.n * site.k
    if isinstance(site, Conv):
        out = site.size // site.stride
        return 2.0 * rows * out * out * site.c_out * site.c_in * site.kernel**2
    return 4.0 * rows * site.heads * site.length * site.keys * site.width

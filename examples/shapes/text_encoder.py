"""The text encoder of `shapes`, and its pre-training: read off from the token states what stands where.

A denoiser learns what words mean only once it can draw. Half a minute of plain classification before that (which color,
which shape, which size is at each place, which background) give it token states its cross-attention can use at once.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .averaging import Averaged
from .progress import Progress, load_checkpoint, save_checkpoint
from .scenes import BACKGROUNDS, OBJECT_COLORS, PLACES, SHAPES, SIZES, Scene, caption, sample_pair, sample_single
from .tokenizer import LENGTH

WIDTH = 128
NOTHING = 0


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModel:
    """A small CLIPTextModel with embeddings large enough to tell words apart from the first step."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        attn_implementation="eager",  # in training on a CPU quicker than the fused attention's backward
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3 if module.num_embeddings > LENGTH else 0.1)
    return model


class Words:
    """Captions to padded token ids, by a dictionary: the tokenizer has one token for each of our words."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, int] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        """Token ids [B, 24] int64, as the tokenizer itself gives with padding="max_length"."""
        tokenizer = self.tokenizer
        ids = torch.full((len(captions), LENGTH), tokenizer.eos_token_id)
        ids[:, 0] = tokenizer.bos_token_id
        for row, text in zip(ids, captions, strict=True):
            words = text.split()
            row[1 : len(words) + 1] = torch.tensor([self._id(word) for word in words], dtype=torch.int64)
        return ids

    def add(self, word: str, index: int) -> None:
        """Give a word the tokenizer does not have this token id."""
        self._ids[word] = index

    def _id(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = self.tokenizer.convert_tokens_to_ids(word + "</w>")
        return self._ids[word]


class PlaceReader(nn.Module):
    """Learned questions, one per place and one for the background, answered by attention over token states."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(PLACES) + 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.color = nn.Linear(WIDTH, 1 + len(OBJECT_COLORS))
        self.shape = nn.Linear(WIDTH, 1 + len(SHAPES))
        self.size = nn.Linear(WIDTH, 1 + len(SIZES))
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))

    def loss(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and the share of scenes answered fully right; states [B, L, D], labels [B, 16] int64."""
        questions = self.questions.expand(len(states), -1, -1)
        answers, _ = self.attention(questions, states, states, need_weights=False)
        places, ground = answers[:, :-1], answers[:, -1]
        logits = [head(places).transpose(1, 2) for head in (self.color, self.shape, self.size)]
        color, shape, size = labels[:, :15].unflatten(1, (3, 5)).unbind(1)
        targets = (color, shape, size)
        loss = sum(F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True))
        ground_logits = self.background(ground)
        loss = loss + F.cross_entropy(ground_logits, labels[:, 15])
        right = ground_logits.argmax(1) == labels[:, 15]
        for a, b in zip(logits, targets, strict=True):
            right &= (a.argmax(1) == b).all(1)
        return loss, right.float().mean()


def labels_of(scenes: list[Scene]) -> Tensor:
    """Per scene: color, shape, size at the five places (0 where nothing stands), then the background; [B, 16]."""
    labels = torch.full((len(scenes), 16), NOTHING)
    for row, scene in zip(labels, scenes, strict=True):
        for item in scene.items:
            place = PLACES.index(item.place)
            row[place] = 1 + OBJECT_COLORS.index(item.color)
            row[5 + place] = 1 + SHAPES.index(item.shape)
            row[10 + place] = 1 + SIZES.index(scene.size)
        row[15] = BACKGROUNDS.index(scene.background)
    return labels


def train(
    work: Path, tokenizer: CLIPTokenizer, heldout: frozenset, *, steps: int, device: str, seed: int = 0
) -> CLIPTextModel:
    """Pre-train the text encoder (or return the one already trained in `work`)."""
    torch.manual_seed(seed)
    model, reader, words = build_text_encoder(tokenizer).to(device), PlaceReader().to(device), Words(tokenizer)
    path = work / "text_encoder.pt"
    if state := load_checkpoint(path):
        model.load_state_dict(state["text"])
        return model
    named = [*model.named_parameters(), *reader.named_parameters()]
    optimizer = Averaged(torch.optim.AdamW(named, lr=1e-3, weight_decay=0.01), warmup=50, decay=0.0)
    progress = Progress("text encoder", steps=steps)
    accuracy = 0.0
    while not progress.done:
        rng = random.Random(f"text {seed} {progress.step}")
        scenes = [sample_single(rng) if i % 3 == 0 else sample_pair(rng, heldout) for i in range(128)]
        ids = words([caption(scene, rng) for scene in scenes]).to(device)
        loss, right = reader.loss(model(ids)[0], labels_of(scenes).to(device))
        optimizer.step(loss, progress)
        accuracy = 0.95 * accuracy + 0.05 * right.item()
        progress.advance(loss)
    print(f"text encoder: {100 * accuracy:.1f} % of captions read fully right", flush=True)
    save_checkpoint(path, {"text": model.state_dict()})
    return model

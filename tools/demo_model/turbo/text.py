"""The two text encoders: each learns what a caption says before any picture is painted.

As the first demo model's (:mod:`tools.demo_model.train_text`), but from the hidden states that SDXL takes, those
before the last layer, and, for the second encoder, from the pooled and projected text as well. The heads that tell
what stands where are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gguf_sd.demo.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES
from gguf_sd.demo.world_large import NUMBERS, PLURALS, RADII, TEXTURES, Sampler, Scene, parse
from tools.demo_model.train_text import layout_loss
from tools.demo_model.vocabulary import END, learn_merges, token_ids, vocabulary

WORDS = sorted(
    {"on", "background", *NUMBERS, *RADII, *COLOURS, *BACKGROUNDS, *TEXTURES[1:], *SHAPES, *PLURALS.values()}
    | set(" ".join(RELATIONS).split())
)
PADS = (END, "!")  # of the two tokenizers, as SDXL's
POOLED = 128
SPREADS, POOLED_SPREAD = (7.4, 5.0), 3.6  # deviations of what both encoders and the projection give
LENGTH = 20  # tokens of an encoded prompt; the longest caption takes 17
PLACES = ("top", "bottom", "left", "right", "middle")
_SIDES = {"above": (0, 1), "below": (1, 0), "left of": (2, 3), "right of": (3, 2)}
CLASSES = [
    *[1 + len(COLOURS)] * len(PLACES),
    *[1 + len(SHAPES)] * len(PLACES),
    *[1 + len(RADII)] * len(PLACES),
    len(NUMBERS),
    1 + len(BACKGROUNDS),
    1 + len(TEXTURES),
]


def text_configs() -> tuple[CLIPTextConfig, CLIPTextConfig]:
    """Of both encoders: 96 and 160 wide, together as wide as the UNet's context."""
    size = len(vocabulary(learn_merges(WORDS)))
    shared = {
        "vocab_size": size,
        "num_hidden_layers": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": POOLED,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    return (
        CLIPTextConfig(
            hidden_size=96, intermediate_size=384, num_attention_heads=3, hidden_act="quick_gelu",
            pad_token_id=size - 1, **shared,
        ),
        CLIPTextConfig(
            hidden_size=160, intermediate_size=640, num_attention_heads=5, hidden_act="gelu",
            pad_token_id=0, **shared,
        ),
    )  # fmt: skip


class TextEncoders(nn.Module):
    """Both encoders as SDXL uses them."""

    def __init__(self) -> None:
        super().__init__()
        first, second = text_configs()
        self.first, self.second = CLIPTextModel(first), CLIPTextModelWithProjection(second)

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Captions -> both encoders' hidden states, [B, LENGTH, 96] and [B, LENGTH, 160], and pooled [B, POOLED]."""
        first, second = (torch.tensor(token_ids(captions, WORDS, LENGTH, pad)) for pad in PADS)
        one = self.first(input_ids=first, output_hidden_states=True)
        two = self.second(input_ids=second, output_hidden_states=True)
        return one.hidden_states[-2], two.hidden_states[-2], two.text_embeds

    @torch.no_grad()
    def encode(self, captions: list[str], batch: int = 64) -> tuple[Tensor, Tensor]:
        """Captions -> context [B, LENGTH, 256] and pooled text [B, POOLED], brought to a deviation near 1: wild
        values make attention slow to learn. In the written model the UNet's weights do it."""
        parts = [self(captions[i : i + batch]) for i in range(0, len(captions), batch)]
        contexts = [torch.cat([p[0] / SPREADS[0], p[1] / SPREADS[1]], -1) for p in parts]
        return torch.cat(contexts), torch.cat([p[2] for p in parts]) / POOLED_SPREAD


def layout(scene: Scene) -> list[int]:
    """What stands where: class indices, 0 = nothing said; of PLACES the colours, shapes and sizes, then the number,
    the background's tone and its texture."""
    colours, shapes, sizes = ([0] * len(PLACES) for _ in range(3))
    places = (4,) if scene.relation is None else _SIDES[scene.relation]
    for where, group in zip(places, scene.groups, strict=True):
        colours[where] = 1 + list(COLOURS).index(group.colour)
        shapes[where] = 1 + SHAPES.index(group.shape)
        sizes[where] = 1 + list(RADII).index(group.size) if group.size else 0
    ground = scene.background
    tone = 1 + list(BACKGROUNDS).index(ground.tone) if ground else 0
    texture = 1 + TEXTURES.index(ground.texture) if ground else 0
    return [*colours, *shapes, *sizes, scene.first.number - 1, tone, texture]


def train_text(seed: int, steps: int, batch: int, log: Callable[[str], None]) -> TextEncoders:
    """Trains both encoders side by side; with held-out captions they are only checked."""
    torch.manual_seed(seed)
    encoders = TextEncoders()
    heads = nn.ModuleList(nn.Linear(width, sum(CLASSES)) for width in (96, 160, POOLED))
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    training, unseen = Sampler(seed), Sampler(seed + 1, held=True)

    def run(captions: list[str]) -> tuple[Tensor, list[float]]:
        target = torch.tensor([layout(parse(caption)) for caption in captions])
        ids = torch.tensor(token_ids(captions, WORDS, LENGTH))
        ended = (ids == ids[:, -1:]).float()  # from the end-of-text token on, everything has been read
        first, second, pooled = encoders(captions)
        told = [(first, ended), (second, ended), (pooled[:, None], ended[:, -1:])]
        results = [
            layout_loss(head(states), target, weight, CLASSES)
            for head, (states, weight) in zip(heads, told, strict=True)
        ]
        return torch.stack([loss for loss, _ in results]).sum(), [right.item() for _, right in results]

    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 100, 1.02 - step / steps)
        loss, _ = run([scene.caption for scene in training.draw(batch)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                _, right = run([scene.caption for scene in unseen.draw(256)])
            shares = " ".join(f"{share:.3f}" for share in right)
            log(f"text {step}, loss {loss.item():.4f}, held-out captions understood {shares}")
    return encoders.eval()

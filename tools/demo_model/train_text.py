"""First stage: the text encoder learns what a caption says, before any picture is painted.

Linear heads on every token from the end-of-text token on must tell, for each place of a picture (top, bottom,
left, right, middle), which colour and which shape stands there, and the background. The heads are thrown away; the
encoder stays as it is while the UNet trains, as Stable Diffusion's own text encoder did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from gguf_sd.demo.world import BACKGROUNDS, COLOURS, SHAPES, Sampler, Scene, parse
from tools.demo_model.vocabulary import LENGTH, learn_merges, token_ids, vocabulary

WIDTH, LAYERS, HEADS = 128, 4, 4
PLACES = ("top", "bottom", "left", "right", "middle")
_SIDES = {"above": (0, 1), "below": (1, 0), "left of": (2, 3), "right of": (3, 2)}
_CLASSES = [1 + len(COLOURS)] * len(PLACES) + [1 + len(SHAPES)] * len(PLACES) + [1 + len(BACKGROUNDS)]


def text_config() -> CLIPTextConfig:
    size = len(vocabulary(learn_merges()))
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def layout(scene: Scene) -> list[int]:
    """What stands where: class indices, 0 = nothing said; colours of PLACES, their shapes, the background."""
    colours, shapes = [0] * len(PLACES), [0] * len(PLACES)
    places = (4,) if scene.relation is None else _SIDES[scene.relation]
    for place, thing in zip(places, scene.things, strict=True):
        colours[place] = 1 + list(COLOURS).index(thing.colour)
        shapes[place] = 1 + SHAPES.index(thing.shape)
    background = 1 + list(BACKGROUNDS).index(scene.background) if scene.background else 0
    return [*colours, *shapes, background]


def layout_loss(
    logits: Tensor, target: Tensor, weight: Tensor, classes: Sequence[int] = _CLASSES
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and the share of tokens with every class right.

    logits [B, N, sum of classes], target [B, len(classes)], weight [B, N] (1 where a token counts).
    """
    losses, right = torch.zeros_like(weight), torch.ones_like(weight)
    for i, part in enumerate(logits.split(list(classes), dim=-1)):
        wanted = target[:, i, None].expand(weight.shape)
        losses = losses + F.cross_entropy(part.flatten(0, 1), wanted.flatten(), reduction="none").view_as(weight)
        right = right * (part.argmax(-1) == wanted)
    return (losses * weight).sum() / weight.sum(), (right * weight).sum() / weight.sum()


def train_text(seed: int, steps: int, batch: int, log: Callable[[str], None]) -> CLIPTextModel:
    """Trains the encoder and returns it; with held-out captions it is only checked."""
    torch.manual_seed(seed)
    model = CLIPTextModel(text_config())
    heads = nn.Linear(WIDTH, sum(_CLASSES))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    training, unseen = Sampler(seed, pairs=0.85), Sampler(seed + 1, held=True)
    started = time.monotonic()

    def run(captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(token_ids(captions))
        target = torch.tensor([layout(parse(c)) for c in captions])
        weight = (ids == ids[:, -1:]).float()
        return layout_loss(heads(model(input_ids=ids).last_hidden_state), target, weight)

    for step in range(1, steps + 1):
        rate = 1e-3 * min(1, step / 200) * min(1, 1.02 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, _ = run([caption for _, caption in training.draw(batch)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                _, right = run([caption for _, caption in unseen.draw(256)])
            seconds = time.monotonic() - started
            log(f"text {step} {seconds:.0f} s, loss {loss.item():.4f}, held-out captions understood {right.item():.3f}")
    return model.eval()

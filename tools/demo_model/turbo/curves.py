"""Training curves from what the stages print.

python -m tools.demo_model.turbo.curves LOG -o curves.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.figure import Figure

VAE = re.compile(r"^(vae|decoder) (\d+), PSNR ([\d.]+) dB")
LOSS = re.compile(r"^(teacher|student|sizes) (\d+), loss ([\d.]+)(?: of first steps, ([\d.]+) of later ones)?")
RIGHT = re.compile(
    r"^(teacher|student|sizes) (\d+), (?:1 step, )?\d+ prompts: "
    r"objects ([\d.]+)%, colours ([\d.]+)%.* relation ([\d.]+)%"
)
Curve = list[tuple[int, float]]


def read(log: str) -> dict[str, dict[str, Curve]]:
    """Panels, each of named curves: points of step and value."""
    names = ("autoencoder: PSNR, dB", "loss in latents", "teacher: % right, 20 steps", "student: % right, 1 step")
    panels: dict[str, dict[str, Curve]] = {name: {} for name in names}

    def put(panel: str, curve: str, step: str, value: str) -> None:
        panels[panel].setdefault(curve, []).append((int(step), float(value)))

    for line in log.splitlines():
        if found := VAE.match(line):
            put(
                names[0],
                {"vae": "with noise in the latents", "decoder": "decoder, with enlarged pictures"}[found[1]],
                *found.groups()[1:],
            )
        elif found := LOSS.match(line):
            stage, step, first, later = found.groups()
            put(names[1], f"{stage}, first steps" if later else stage, step, first)
            if later:
                put(names[1], f"{stage}, later steps", step, later)
        elif found := RIGHT.match(line):
            stage, step, *shares = found.groups()
            for what, share in zip(("objects", "colours", "relation"), shares, strict=True):
                put(names[2 if stage == "teacher" else 3], f"sizes, {what}" if stage == "sizes" else what, step, share)
    return panels


def draw(panels: dict[str, dict[str, Curve]]) -> Figure:
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=9)
        if "loss" in title:
            axes.set_yscale("log")
        if "%" in title:
            axes.set_ylim(0, 102)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="what the training printed")
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    draw(read(chosen.log.read_text())).savefig(chosen.output)


if __name__ == "__main__":
    main()

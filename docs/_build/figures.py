"""Draws docs/figures/shapes.svg: what units can answer to an input that grows, without and with inhibition.

python docs/_build/figures.py
"""

from pathlib import Path

import torch
from torch import nn

from lightning_danns import DANNLinear

FIGURE = Path(__file__).parents[1] / "figures" / "shapes.svg"
WIDTH, HEIGHT, GAP = 270, 190, 40


class Excitatory(nn.Linear):
    """Non-negative weights alone; the free bias silences the layer for about half of the inputs."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, 0, 2 / self.in_features)
        nn.init.uniform_(self.bias, -1, 0)


def outputs(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Each unit's answer, (points, units), from 0 to 1."""
    with torch.no_grad():
        z = network(inputs)
    z = z - z.min(0).values
    return z / z.max(0).values


def panel(left: float, title: str, lines: torch.Tensor, kind: str) -> str:
    """One frame with a curve for each unit."""
    across = torch.linspace(left + 10, left + WIDTH - 10, len(lines))
    curves = []
    for unit in lines.T:
        down = 40 + (1 - unit) * (HEIGHT - 20)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across.tolist(), down.tolist(), strict=True))
        curves.append(f'<polyline class="{kind}" points="{points}"/>')
    frame = f'<rect class="frame" x="{left}" y="30" width="{WIDTH}" height="{HEIGHT}"/>'
    return f'<text x="{left + WIDTH / 2}" y="18">{title}</text>\n{frame}\n' + "\n".join(curves)


def draw() -> str:
    """The figure, in the colours and the font of the page that holds it."""
    torch.manual_seed(3)
    dark = torch.rand(20) * 0.3
    inputs = dark + torch.linspace(0, 1, 101)[:, None] * torch.rand(20) ** 3 * 2  # every input grows
    alone = nn.Sequential(Excitatory(20, 50), nn.ReLU(), Excitatory(50, 50), nn.ReLU(), Excitatory(50, 5))
    dann = nn.Sequential(DANNLinear(20, 50, 5), nn.ReLU(), DANNLinear(50, 50, 5), nn.ReLU(), DANNLinear(50, 5, 1))
    left = panel(1, "excitation alone", outputs(alone, inputs), "excitation")
    right = panel(WIDTH + GAP, "with inhibition", outputs(dann, inputs), "inhibition")
    axis = f'<text x="{WIDTH + GAP / 2}" y="{HEIGHT + 55}">input, from dark to bright</text>'
    size = f"0 0 {2 * WIDTH + GAP + 1} {HEIGHT + 65}"
    label = "Each unit's answer to an input that grows: increasing and convex without inhibition, any shape with it"
    return f'<svg class="figure" viewBox="{size}" role="img" aria-label="{label}">\n{left}\n{right}\n{axis}\n</svg>\n'


if __name__ == "__main__":
    FIGURE.write_text(draw())

"""What a DANN has learned: distributions of its weights, and of its units' activity over the test images."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.layers.dann import DANN
from lightning_danns.report.style import COLOURS, COLUMN, PAGE, plt

NET = "Wex - Wei Wix"

KEPT = 200_000
"""Values of one layer that a histogram is made of, at most, drawn evenly from its units and images."""


def trained_dann(folder: Path) -> tuple[nn.Module, Sequence[Any]]:
    """The network of a run at its last checkpoint, and the batches of its test images.

    Raises:
        UsageError: the run cannot be made again from its folder, or has no layers of a DANN.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        model, data = (_class(config[part]["class_path"]) for part in ("model", "data"))
        datamodule = data(**(config["data"].get("init_args") or {}))
        module = model.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", map_location="cpu").eval()
        if not any(isinstance(layer, DANN) for layer in module.modules()):
            raise UsageError("it has no layers of a DANN")
        datamodule.prepare_data()
        datamodule.setup("test")
        return module, datamodule.test_dataloader()
    except Exception as error:  # whatever the run's own classes raise: they may be anybody's, and of another version
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{folder}: its network or data cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def has_dann(folder: Path) -> bool:
    """Whether its last checkpoint holds the weights of a layer of a DANN."""
    try:
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, mmap=True, map_location="cpu")
        return any(name.endswith(".Wix") for name in checkpoint["state_dict"])
    except Exception:  # torch raises many kinds for a damaged file, which is no more to be drawn than one without
        return False


def weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Wex, Wix, Wei, g and the net weights Wex - Wei Wix of each layer of a DANN, by its name."""
    found = {}
    for name, layer in _layers(model):
        kinds = {kind: getattr(layer, kind) for kind in ("Wex", "Wix", "Wei", "g")}
        found[name] = {kind: value.detach() for kind, value in kinds.items() if value is not None}
        found[name][NET] = layer.net_weight().detach()
    return found


@torch.no_grad()
def activity(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """z of each layer over ``batches``, and h = ReLU(z) of the hidden ones: values drawn evenly, not all of them."""
    layers = _layers(model)
    kept: dict[str, list[Tensor]] = {name: [] for name, _ in layers}
    generator = torch.Generator().manual_seed(0)

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, z: Tensor) -> None:
            drawn = torch.randint(z.numel(), (min(z.numel(), KEPT // len(batches) + 1),), generator=generator)
            kept[name].append(z.flatten()[drawn])

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    try:
        for images, _ in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: {"z": torch.cat(values)} for name, values in kept.items()}
    for name, _ in layers[:-1]:
        found[name]["h"] = found[name]["z"].relu()
    return found


def _layers(model: nn.Module) -> list[tuple[str, DANN]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DANN)]


def histograms(values: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """A row of histograms for each layer, a column for each kind of value; zeros are counted apart, in the text."""
    kinds = list(dict.fromkeys(kind for layer in values.values() for kind in layer))
    size = (PAGE if len(kinds) > 2 else COLUMN, 0.3 + 1.15 * len(values))
    figure, axes = plt.subplots(len(values), len(kinds), figsize=size, squeeze=False)
    for row, (name, layer) in zip(axes, values.items(), strict=True):
        row[0].set_ylabel(name)
        for panel, kind in zip(row, kinds, strict=True):
            if kind in layer:
                _histogram(panel, layer[kind].flatten().float(), COLOURS[kinds.index(kind) % len(COLOURS)])
                if kind not in (NET, "z"):  # which have any sign
                    zeros = 100 * float((layer[kind] == 0).float().mean())
                    panel.text(
                        0.98, 1, f"{zeros:.2g} % zeros", ha="right", va="top", transform=panel.transAxes, fontsize=7
                    )
            else:
                panel.set_axis_off()
    for panel, kind in zip(axes[0], kinds, strict=True):
        panel.set_title(kind)
    return figure


def _histogram(panel: Axes, values: Tensor, colour: str) -> None:
    others = values[values != 0].numpy()
    low, high = np.quantile(others, [0.001, 0.999]) if len(others) else (0.0, 0.0)
    if len(others) < len(values):
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:  # a single value
        low, high = low - 0.5, high + 0.5
    panel.hist(np.clip(others, low, high), bins=40, range=(low, high), color=colour, histtype="stepfilled")
    if low < 0 < high:
        panel.axvline(0, ymax=0.85, color="black", linewidth=0.6)
    panel.margins(y=0.25)  # room for the text
    panel.set_ylim(bottom=0)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(2 if abs(high) > 50 * (high - low) or high - low < 0.01 else 3))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))

"""What units and interneurons do with every sample of a loader, layer by layer, for analysis elsewhere."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_danns.analysis.diagnostics import inspectable_layers
from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import DaleModule
from lightning_danns.layers.dann import at_least_float32, without_autocast

Quantity = Literal["z", "h", "z_i"]
"""What a layer's units are driven to (z), what they pass on through a ReLU (h), what its interneurons do (z_i)."""


def activity(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Collection[str] | None = None,
    quantities: Sequence[Quantity] = ("z", "z_i"),
    memmap: str | Path | None = None,
) -> dict[str, dict[str, Tensor | np.ndarray]]:
    """Activity of the layers of ``model`` for all samples of ``loader``, in the order in which it serves them.

        z    (samples, ..., units), the layer's output: of DANN layers after g and b, of ordinary ones too
        h    ReLU(z): what the units pass on, if nothing (a normalisation, for example) stands between z and the ReLU
        z_i  (samples, ..., interneurons); only of layers that have `components`

    Units are counted by the dimension where the layer has them: 1 in a convolution, (samples, units, height, width).
    The model runs in evaluation mode, without gradients, on the device where it is; what it gives comes to the CPU, in
    float32 if it is in half precision.

    Args:
        model: any torch model with DANN layers, ColumnEI layers, or ordinary `nn.Linear` and `nn.Conv2d`.
        loader: serves batches of inputs, or tuples and lists that begin with them.
        layers: their names in ``model.named_modules()``. Not given: all of those kinds that the samples pass through.
        quantities: which of the three.
        memmap: a folder for arrays larger than the memory: each is written to ``LAYER.QUANTITY.npy`` batch by batch.

    Returns:
        By layer and quantity, a tensor, or with ``memmap`` the memory-mapped array of the file.

    Raises:
        UsageError: an unknown layer or quantity; a layer that is not called exactly once for each batch; batches of
            different shapes; an empty loader.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> net = nn.Sequential(DANNLinear(9, 20, 2, inputs="pixels"), nn.ReLU(), DANNLinear(20, 5, 1))
        >>> seen = activity(net, [torch.rand(8, 9), torch.rand(4, 9)])
        >>> {name: {quantity: tuple(values.shape) for quantity, values in of.items()} for name, of in seen.items()}
        {'0': {'z_i': (12, 2), 'z': (12, 20)}, '2': {'z_i': (12, 1), 'z': (12, 5)}}
    """
    for quantity in quantities:
        if quantity not in get_args(Quantity):
            raise UsageError(f"quantity {quantity!r}: choose of {', '.join(map(repr, get_args(Quantity)))}")
    known = dict(inspectable_layers(model))
    for name in layers or ():
        if name not in known:
            raise UsageError(f"{name!r} is no layer with activity; these are: {', '.join(known)}")
    chosen = {known[name]: name for name in (known if layers is None else layers)}
    if not chosen:
        raise UsageError(f"{type(model).__name__} has no layers with activity: no DaleModule, nn.Linear or nn.Conv2d")
    stores: dict[tuple[str, str], list[Tensor] | _File] = {}
    shapes: dict[tuple[str, str], torch.Size] = {}
    calls: Counter[str] = Counter()
    batches = 0

    def keep(name: str, quantity: str, values: Tensor) -> None:
        key = name, quantity
        values = at_least_float32(values).cpu()
        if key not in stores:
            path = None if memmap is None else Path(memmap) / f"{name or 'model'}.{quantity}.npy"
            stores[key], shapes[key] = [] if path is None else _File(path, values), values.shape
        if values.shape[1:] != shapes[key][1:]:
            raise UsageError(
                f"layer {name!r} gives {tuple(values.shape)} for one batch and {tuple(shapes[key])} for another"
            )
        # a copy in memory, because the next operation may write into it, as ReLU(inplace=True) does
        stores[key].append(values.clone() if memmap is None else values)

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> None:
        name = chosen[layer]
        calls[name] += 1
        if "z_i" in quantities and isinstance(layer, DaleModule):
            x = next(iter((*args, *kwargs.values())))
            with without_autocast(x):
                parts = layer.components(x.to(z.dtype))
            if parts is not None:
                keep(name, "z_i", parts.z_i)
        if "z" in quantities:
            keep(name, "z", z)
        if "h" in quantities:
            keep(name, "h", z.relu())

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in chosen]
    try:
        with evaluating(model), torch.no_grad():
            for batch in loader:
                batches += 1
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
    finally:
        for handle in handles:
            handle.remove()
        for store in stores.values():
            if isinstance(store, _File):
                store.close()
    for name in calls if layers is None and calls else chosen.values():
        if calls[name] != batches or not batches:
            raise UsageError(
                f"layer {name!r} is called {calls[name]} times in {batches} batches, not once in each: name other "
                "layers in layers= (torch.compile hides the calls of a compiled model)"
            )
    result: dict[str, dict[str, Tensor | np.ndarray]] = {}
    for (name, what), store in stores.items():
        result.setdefault(name, {})[what] = torch.cat(store) if isinstance(store, list) else store.whole()
    return result


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; each module then is in the mode in which it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


class _File:
    """An array in a .npy file, which grows along its first axis: numpy leaves room for that number in the header."""

    def __init__(self, path: Path, like: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._shape, self._dtype = path, (0, *like.shape[1:]), like.numpy().dtype
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._write_header()

    def append(self, values: Tensor) -> None:
        self._file.write(np.ascontiguousarray(values.numpy()).data)
        self._shape = (self._shape[0] + len(values), *self._shape[1:])

    def _write_header(self) -> None:
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def close(self) -> None:
        self._write_header()
        self._file.close()

    def whole(self) -> np.ndarray:
        return np.load(self._path, mmap_mode="r")

"""Which tensors of a forward pass cannot be negative, whatever the weights: a proof that follows the operations."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

# Private, because a proof must see every operation: torch has no public way to follow them through any control flow.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of ATen operations, without the underscore at the end that marks those in place.
ALWAYS = {"relu", "bernoulli", "sigmoid", "hardsigmoid", "_softmax", "exp", "abs", "sqrt"}
"""The result is >= 0 for any input."""
OF_TENSORS = {
    *("cat", "stack", "clone", "_to_copy", "copy", "repeat", "flip", "roll", "native_dropout"),
    *("mean", "sum", "amax", "amin", "maximum", "minimum", "pixel_shuffle", "channel_shuffle"),
    *(f"{kind}_pool{n}d" for kind in ("_adaptive_avg", "adaptive_max", "avg") for n in (1, 2, 3)),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_nearest2d", "upsample_bilinear2d"),
    *("reflection_pad2d", "replication_pad2d"),
}
"""The result is >= 0 if all tensors that go in are."""
OF_TENSORS_AND_NUMBERS = {"add", "mul", "div", "constant_pad_nd"}
"""The same, and the numbers among the arguments must be >= 0 as well."""


class NonNegativity(TorchDispatchMode):
    """While active, knows of each tensor whether its origin guarantees that it is >= 0.

    It sees every operation that PyTorch runs, in any Python control flow, and knows a result as non-negative by the
    rules above; by an unknown operation nothing is guaranteed, nor of parameters. Views share what is known of their
    memory, and writing in place renews it. So the guarantee holds for the path that this forward pass takes. It does
    not see memory that is changed from outside PyTorch (NumPy).

    Args:
        inputs: tensors, of which those without a negative value are taken as never negative.

    Attributes:
        reads: how many operations have read the memory at an `address`.

    Example:
        >>> x = torch.rand(3)
        >>> with NonNegativity(x) as known:
        ...     pooled, shifted = x.relu().view(1, 3).mean(), (x - 0.0).mean()
        >>> known.origin(pooled), known.origin(shifted)
        (None, 'sub')
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        # by address of memory: what is known of it, and the memory itself, so that no address is used again
        self._known: dict[int, tuple[str | None, torch.dtype, Any]] = {}
        self.reads: Counter[int] = Counter()
        for x in inputs:
            self._note(x, None if bool((x >= 0).all()) else "the input")

    def origin(self, tensor: Tensor) -> str | None:
        """None if ``tensor`` cannot be negative; otherwise the last operation that no rule above covers."""
        origin, dtype, _ = self._known.get(address(tensor), ("a parameter or constant", tensor.dtype, None))
        return f"a view as {tensor.dtype}" if origin is None and dtype != tensor.dtype else origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        name = name.rstrip("_") or name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {address(tensor) for tensor in tensors}
        self.reads.update(given)
        origin = self._origin(name, tensors, args, kwargs)
        written = [
            (args[k] if k < len(args) else kwargs.get(argument.name))
            for k, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        outputs = func(*args, **kwargs)
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
                self._note(tensor, origin if whole or origin else self.origin(tensor))
        for tensor in tree_leaves(outputs):
            # what lies in given memory is a view or was written just now
            if isinstance(tensor, Tensor) and address(tensor) not in given:
                self._note(tensor, origin)
        return outputs

    def _note(self, tensor: Tensor, origin: str | None) -> None:
        exact = tensor.is_floating_point() or tensor.dtype in (torch.bool, torch.uint8)  # other integers overflow
        known = origin if exact else f"{tensor.dtype}"
        self._known[address(tensor)] = (known, tensor.dtype, tensor.untyped_storage())

    def _origin(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> str | None:
        """What `origin` says of the result of an operation."""
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
        positive = all(number >= 0 for number in numbers)
        if name in OF_TENSORS or (name in OF_TENSORS_AND_NUMBERS and positive):
            return next((origin for tensor in tensors if (origin := self.origin(tensor)) is not None), None)
        guaranteed = name in ALWAYS or (name == "softplus" and positive)
        if name in ("clamp", "clamp_min", "hardtanh"):  # relu6 is hardtanh from 0 to 6
            low = args[1] if len(args) > 1 else kwargs.get("min")
            guaranteed = positive and isinstance(low, int | float)
        if name == "pow":
            guaranteed = len(numbers) == 1 and isinstance(args[0], Tensor) and numbers[0] % 2 == 0
        return None if guaranteed else name


def address(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins; its views have the same address."""
    return tensor.untyped_storage().data_ptr()

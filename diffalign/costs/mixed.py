"""Mixed precision on torch's meta device, where torch.autocast does not exist."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _named(*names: str) -> frozenset[Callable[..., Any]]:
    """Functions and methods of torch by their names."""
    return frozenset(getattr(place, name) for place in (torch, Tensor, F) for name in names if name in dir(place))


_LOWER = _named(
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm", "chain_matmul"),
    *("einsum", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu"),
    "scaled_dot_product_attention",
)
_FLOAT32 = _named(
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan"),
    *("pow", "__pow__", "__rpow__", "softplus", "layer_norm", "rms_norm", "group_norm", "norm", "normalize", "cosine_similarity", "dist"),
    *("cdist", "renorm", "logsumexp", "softmax", "log_softmax", "interpolate"),
)
_SUMS = _named("sum", "prod", "cumsum", "cumprod")
_WIDEST = _named("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sample", "index_put", "tensordot", "scatter_add")


class MixedPrecision(TorchFunctionMode):
    """Casts what torch.autocast casts on a GPU, for tensors without memory: products to `compute`, norms and powers to float32.

    The lists are those of torch.autocast for CUDA. Weights that are trained are cast once, and their casts live until the block ends; the
    casts of frozen weights live as long as they are used. Approximated is what torch casts below Python: a function that is written in
    Python and calls such an operator inside (torch's own multi-head attention) is seen only if its name is listed, and regions in which a
    network turns autocast off are not left out. A CPU casts less (norms stay in `compute`), or nothing if it has no units for the type.

    Args:
        compute: type of the products
        keeps: whether casts of trained weights are kept; blocks that are computed again in the backward pass begin without any

    Reference: https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
    """

    def __init__(self, compute: torch.dtype, *, keeps: bool = True) -> None:
        super().__init__()
        self.compute = compute
        self.keeps = keeps
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __exit__(self, *error: Any) -> None:
        self._kept.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOWER:
            return func(*self._all(args, self.compute), **self._all(kwargs, self.compute))
        if func in _FLOAT32:
            return func(*self._all(args, torch.float32), **self._all(kwargs, torch.float32))
        if func in _WIDEST:
            widest = max(self._types([args, kwargs]), key=lambda dtype: dtype.itemsize, default=torch.float32)
            return func(*self._all(args, widest), **self._all(kwargs, widest))
        if func in _SUMS and kwargs.get("dtype") is None and args and _is_cast(args[0]):
            return func(*args, **{**kwargs, "dtype": torch.float32})
        return func(*args, **kwargs)

    def _all(self, values: Any, dtype: torch.dtype) -> Any:
        """Cast the tensors in arguments, in lists too."""
        if isinstance(values, Tensor):
            return self._cast(values, dtype) if _is_cast(values) and values.dtype != dtype else values
        if isinstance(values, Mapping):
            return {name: self._all(value, dtype) for name, value in values.items()}
        return type(values)(self._all(value, dtype) for value in values) if type(values) in (list, tuple) else values

    def _cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if not (self.keeps and dtype == self.compute and value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in self._kept:
            self._kept[id(value)] = value, value.to(dtype)
        return self._kept[id(value)][1]

    def _types(self, values: Any) -> Iterable[torch.dtype]:
        if isinstance(values, Tensor):
            return [values.dtype] if _is_cast(values) else []
        inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
        return [dtype for value in inner for dtype in self._types(value)]


def _is_cast(value: Any) -> bool:
    """True for what torch.autocast may cast: numbers in a floating type of at most 32 bits, here on the meta device."""
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64

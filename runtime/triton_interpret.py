"""Running a printed Triton module in Triton's interpreter, on CPU tensors.

The interpreter has no `libdevice`, folds a custom reduction element by element in Python, truncates where bf16 should
round and multiplies its raw bits, so in an interpreted copy of a module those names stand for NumPy versions; `range`
takes interpreted scalars, which Triton 3.6 can't make integers of under NumPy 2.4. The kernels themselves are
interpreted as printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Masked lanes compute on padding: their overflows and divisions by zero mean nothing."""
    with np.errstate(all="ignore"):
        yield


def make_interpreted(module: ModuleType) -> None:
    """Turn the jitted functions of our own module into interpreted ones, in place."""
    from triton.runtime.interpreter import InterpretedFunction

    for name, value in list(vars(module).items()):
        if name in _ROW_FUNCTIONS:
            setattr(module, name, _row_function(_ROW_FUNCTIONS[name]))
        elif name in _PAIR_FUNCTIONS:
            setattr(module, name, _lift(_PAIR_FUNCTIONS[name]))
        elif name in _BF16_FUNCTIONS:
            setattr(module, name, _BF16_FUNCTIONS[name])
        elif name in _DOT_FUNCTIONS:
            setattr(module, name, _dot)
        elif hasattr(value, "fn") and getattr(value.fn, "__module__", None) == module.__name__:
            setattr(module, name, InterpretedFunction(value.fn))
    module.range = _range  # type: ignore[attr-defined]
    module.libdevice = SimpleNamespace(**{n: _lift(f) for n, f in _LIBDEVICE.items()})  # type: ignore[attr-defined]


def _range(*bounds: Any) -> range:
    """`range` over Python integers and interpreted scalars, which are arrays of one element."""
    return range(*[int(b.handle.data.item()) if hasattr(b, "handle") else b for b in bounds])


def _lift(function: Callable[..., Array]) -> Callable[..., Any]:
    """A NumPy function as one over interpreted Triton tensors, which broadcast like arrays."""

    def call(*args: Any) -> Any:
        arrays = [np.asarray(a.handle.data) if hasattr(a, "handle") else a for a in args]
        shaped = next(a for a in args if hasattr(a, "handle"))
        shape = np.broadcast_shapes(*[_block_shape(a) for a in args])
        result = function(*arrays)
        return _tensor(np.asarray(result, dtype=shaped.handle.data.dtype), shaped, shape)

    return call


def _row_function(function: Callable[..., Array]) -> Callable[..., Any]:
    """A NumPy reduction along axis 1 that keeps it with size 1."""

    def call(value: Any) -> Any:
        data = value.handle.data
        result = function(data, axis=1, keepdims=True).astype(data.dtype)
        return _tensor(result, value, result.shape)

    return call


def _block_shape(value: Any) -> tuple[int, ...]:
    if not hasattr(value, "handle"):
        return ()
    return tuple(int(s) for s in value.shape)


def _tensor(data: Array, like: Any, shape: tuple[int, ...], scalar: Any = None) -> Any:
    """An interpreted tensor of `data`, of the element type of `like` unless `scalar` names another."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    scalar = scalar or like.dtype.scalar
    if not shape:
        return tl.core.tensor(TensorHandle(data.reshape(1), scalar), scalar)
    return tl.core.tensor(TensorHandle(data.reshape(shape), scalar), tl.block_type(scalar, list(shape)))


def _to_bf16(value: Any) -> Any:
    """f32 to bf16, which the interpreter keeps as 16 raw bits; rounds to nearest even."""
    import triton.language as tl

    data = np.ascontiguousarray(value.handle.data, dtype=np.float32)
    bits = data.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(np.isnan(data), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return _tensor(rounded.astype(np.uint16), value, _block_shape(value), tl.bfloat16)


def _from_bf16(value: Any) -> Any:
    import triton.language as tl

    data = (value.handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _tensor(data, value, _block_shape(value), tl.float32)


def _dot(a: Any, b: Any, acc: Any) -> Any:
    """`acc + a @ b` in f32: bf16 is widened exactly, and tf32 is not rounded to."""
    left, right = (_widened(v) for v in (a, b))
    return _tensor(acc.handle.data + left @ right, acc, _block_shape(acc))


def _widened(value: Any) -> Array:
    tensor = _from_bf16(value) if value.dtype.scalar.name == "bf16" else value
    found: Array = tensor.handle.data.astype(np.float32)
    return found


def _tree_product(data: Array, axis: int, keepdims: bool) -> Array:
    """Product along axis 1 in a tree, as accurate as a GPU's (np.prod multiplies in sequence)."""
    while data.shape[axis] > 1:
        half = data.shape[axis] // 2  # blocks are powers of two
        data = data[:, :half] * data[:, half:]
    return data


def _erf(x: Array) -> Array:
    return _through_torch("erf", x)


def _erfc(x: Array) -> Array:
    return _through_torch("erfc", x)


def _through_torch(name: str, x: Array) -> Array:
    import torch

    result: Array = getattr(torch, name)(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return result


_ROW_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "row_sum": np.sum, "row_prod": _tree_product, "row_max": np.max, "row_min": np.min,  # NaN wins in NumPy's max, too
}
_PAIR_FUNCTIONS: dict[str, Callable[..., Array]] = {"max_of": np.maximum, "min_of": np.minimum}
_BF16_FUNCTIONS: dict[str, Callable[..., Any]] = {"to_bf16": _to_bf16, "from_bf16": _from_bf16}
_DOT_FUNCTIONS = ("tile_dot", "tile_dot_exact", "tile_dot_tf32")
_LIBDEVICE: dict[str, Callable[..., Array]] = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
    "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "erf": _erf, "erfc": _erfc, "trunc": np.trunc,
    "rint": np.rint, "pow": np.power, "atan2": np.arctan2, "copysign": np.copysign, "hypot": np.hypot, "fmod": np.fmod,
}

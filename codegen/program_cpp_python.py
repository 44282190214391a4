"""Operators that a C++ program hands back to Python: their arguments have no form in torch's C shim.

The program calls `entry(number, tensors, sizes, results)`; ctypes takes the interpreter lock. The argument trees hold
tensors and symbolic sizes in a fixed order, which is the order they cross in.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..runtime import torch_compat
from ..runtime.program import Call, Json, tensors_in
from .schema import operator_of

_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64),
                          ctypes.POINTER(ctypes.c_void_p))


class PythonOperators:
    """The callback of one program. An exception is kept per thread until `error()` fetches it."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = [(call, operator_of(call.op), len(tensors_in([list(call.args), list(call.kwargs.values())])))
                       for call in calls]
        self._kept = threading.local()
        self._entry = _ENTRY(self._run) if calls else None
        self.entry = ctypes.cast(self._entry, ctypes.c_void_p) if self._entry is not None else None

    def error(self) -> BaseException | None:
        """The exception of this thread's last call, once."""
        found, self._kept.error = getattr(self._kept, "error", None), None
        return found

    def _run(self, number: int, given: Any, sizes: Any, made: Any) -> int:
        try:
            call, operator, count = self._calls[number]
            tensors = iter(torch_compat.borrowed_tensors([given[i] for i in range(count)]))
            numbers = (sizes[i] for i in range(1 << 30))
            args = _fill(list(call.args), tensors, numbers)
            kwargs = {name: _fill(value, tensors, numbers) for name, value in call.kwargs.items()}
            result = operator(*args, **kwargs)
            results = list(result) if isinstance(result, (list, tuple)) else [result]
            for k, name in enumerate(call.outs):
                if name is not None:
                    made[k] = torch_compat.handle_address(results[k])
        except BaseException as error:  # must not cross C++; raised again by the caller
            self._kept.error = error
            return 1
        return 0


def _fill(tree: Json, tensors: Iterator[torch.Tensor], sizes: Iterator[int]) -> Any:
    if isinstance(tree, (list, tuple)):
        return [_fill(item, tensors, sizes) for item in tree]
    if not isinstance(tree, dict):
        return tree
    (key, value), = tree.items()
    if key == "tensor":
        return next(tensors)
    if key == "size":
        return next(sizes)
    if key == "float":
        return float(value)
    return torch.device(value) if key == "device" else getattr(torch, value)

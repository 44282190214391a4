"""Questions that transformers asks of a tensor's values, answered without values."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ...runtime import torch_compat


@contextlib.contextmanager
def plain_sequences() -> Iterator[None]:
    """Within it, transformers takes every sequence as one whole text without padding, as its own code does for such
    data: attention is causal and needs no mask. Tensors inside AOTAutograd count as being traced, as fake ones do."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    imports: Any = sys.modules.get("transformers.utils.import_utils")
    answers = [(masks, "find_packed_sequence_indices", lambda *_, **__: None),
               (imports, "is_fake_tensor", torch_compat.is_traced)]
    before = [(module, name, getattr(module, name), answer) for module, name, answer in answers
              if hasattr(module, name)]
    try:
        for module, name, _, answer in before:
            setattr(module, name, answer)
        yield
    finally:
        for module, name, old, _ in before:
            setattr(module, name, old)

"""`meshwright model`: what a model's layers compute, own and save, as a table and as JSON."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost_model.model import RECOMPUTE_MODES, LayerKind, ModelDescription
from .planner.capture_model import capture_model

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SIZES = (("heads", "heads"), ("kv_heads", "kv heads"), ("ffn", "ffn"), ("experts", "experts"), ("top_k", "top-k"),
         ("expert_ffn", "expert ffn"), ("vocabulary", "vocabulary"))


@dataclass(frozen=True)
class ModelReport:
    """A model's description and the seconds that it took."""

    model: ModelDescription
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The description as plain data: `cost_model.model.model_from_json` reads it."""
        return self.model.as_dict()

    def __rich__(self) -> Group:
        from rich.console import Group

        m = self.model
        layers = [m.kinds[k] for k in m.order]
        flops = [sum(n) / m.tokens for n in zip(*((k.flops_forward, k.flops_backward) for k in layers), strict=True)]
        head = (f"{m.name}: {_count(m.parameter_count)} parameters · {m.seq} tokens × micro-batch {m.micro_batch} · "
                f"{_count(flops[0])} + {_count(flops[1])} FLOP per token forward + backward")
        sizes = [f"{k.name}: {_sizes(k)}" for k in m.kinds if _sizes(k)]
        foot = f"captured in {self.seconds:.1f} s, no weights allocated"
        return Group(head, self._table(), *sizes, *(f"note: {n}" for n in m.notes), foot)

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title="layers: FLOP per token, saved MiB per layer and micro-batch by recomputation",
                      title_justify="left")
        table.add_column("layer")
        for name in ("count", "parameters", "forward", "backward", *RECOMPUTE_MODES, "capture s"):
            table.add_column(name, justify="right")
        for i, kind in enumerate(self.model.kinds):
            saved = [f"{kind.saved[mode].bytes / 2**20:.1f}" for mode in RECOMPUTE_MODES]
            flops = [_count(n / self.model.tokens) for n in (kind.flops_forward, kind.flops_backward)]
            table.add_row(kind.name, str(self.model.count(i)), _parameters(kind), *flops, *saved,
                          f"{kind.capture_s:.2f}")
        return table


def describe_model(spec: str, *, seq: int, micro_batch: int, dtype: str, imbalance: float,
                   verify_folding: bool) -> ModelReport:
    """Capture the model that `spec` names. Raises `MeshwrightError` for what can't be captured."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its remarks are about training and generation
    started = time.perf_counter()
    model = capture_model(spec, seq=seq, micro_batch=micro_batch, dtype=dtype, imbalance=imbalance,
                          verify_folding=verify_folding)
    return ModelReport(model, time.perf_counter() - started)


def _parameters(kind: LayerKind) -> str:
    frozen = sum(p.count for p in kind.parameters if not p.trainable)
    tied = sum(p.count for p in kind.tied)
    marks = [f"{_count(n)} {word}" for n, word in ((frozen, "frozen"), (tied, "tied")) if n]
    return _count(kind.parameter_count) + (f" ({', '.join(marks)})" if marks else "")


def _sizes(kind: LayerKind) -> str:
    return ", ".join(f"{getattr(kind, field)} {name}" for field, name in SIZES if getattr(kind, field) is not None)


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"

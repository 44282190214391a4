"""Experts without data: which token goes to which expert is not known, how many tokens go to experts is.

Loops over the experts that were hit can't be traced. So modules that hold experts are recognised by their build, and
run for `tokens × top-k × imbalance` rows through grouped products: row counts per expert add up to that, whatever the
router says, and no token is dropped. Two builds are known:

* 3-D parameters, one slice per expert, as transformers' `use_experts_implementation` describes them;
* a `ModuleDict` or `ModuleList` of congruent experts with a `forward(tokens, selected, weights)` of its own, whose
  matrix products are `nn.Linear`: the experts' weights become slices of one 3-D parameter.

Every other data-dependent module is refused by name when the model is run (`layers.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from ...runtime.errors import UnsupportedError

torch.library.define("meshwright_planner::grouped_mm", "(Tensor rows, Tensor weights) -> Tensor")
torch.library.define("meshwright_planner::grouped_mm_weights", "(Tensor rows, Tensor grad, int experts) -> Tensor")


@torch.library.register_fake("meshwright_planner::grouped_mm")  # type: ignore[untyped-decorator]
def _grouped(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [S, K], weights [E, K, N] -> [S, N]: each row by the weights of its expert."""
    return rows.new_empty(rows.size(0), weights.size(2))


@torch.library.register_fake("meshwright_planner::grouped_mm_weights")  # type: ignore[untyped-decorator]
def _grouped_weights(rows: torch.Tensor, grad: torch.Tensor, experts: int) -> torch.Tensor:
    """rows [S, K], grad [S, N] -> [E, K, N]: gradient of the weights."""
    return rows.new_empty(experts, rows.size(1), grad.size(1))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rows, weights = ctx.saved_tensors
    ops, (wants_rows, wants_weights) = torch.ops.meshwright_planner, ctx.needs_input_grad
    return (ops.grouped_mm(grad, weights.transpose(1, 2)) if wants_rows else None,
            ops.grouped_mm_weights(rows, grad, weights.size(0)) if wants_weights else None)


torch.library.register_autograd("meshwright_planner::grouped_mm", _backward, setup_context=_keep)


@register_flop_formula(torch.ops.meshwright_planner.grouped_mm)
def _grouped_flops(rows: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * weights[2]  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.meshwright_planner.grouped_mm_weights)
def _grouped_weights_flops(rows: Any, grad: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * grad[1]  # type: ignore[no-any-return]


# Containers that transformers fill with one module per expert, by model type: Switch-C would be 300,000 modules.
CONTAINERS = {"switch_transformers": ("transformers.models.switch_transformers.modeling_switch_transformers",
                                      "SwitchTransformersExperts")}
NUMBER = "number_of_experts"  # what `one_expert_each` writes on a container


@contextlib.contextmanager
def one_expert_each(model_type: str) -> Iterator[None]:
    """Within it, the containers of `CONTAINERS` get one expert and their number: all that `price_experts` reads."""
    if model_type not in CONTAINERS:
        yield
        return
    module, name = CONTAINERS[model_type]
    kind: Any = getattr(importlib.import_module(module), name)
    original = kind.__init__

    def init(self: Any, config: Any) -> None:
        one = copy.copy(config)
        one.num_experts = 1
        original(self, one)
        setattr(self, NUMBER, config.num_experts)

    kind.__init__ = init
    try:
        yield
    finally:
        kind.__init__ = original


def price_experts(model: nn.Module, imbalance: float) -> list[str]:
    """Exchange the forward of every experts module in `model`. Returns the names of their classes.

    Raises `UnsupportedError` for a container of experts whose own parts are not understood.
    """
    found = []
    for name, module in list(model.named_modules()):
        _convert_once(module)
        if _has_stacked_parameters(module):
            module.forward = functools.partial(_stacked_parameters, module, imbalance)  # type: ignore[method-assign]
        elif _is_container(module):
            _exchange(model, name, _Experts(name, module, imbalance))
        else:
            continue
        found.append(type(module).__name__)
    return sorted(set(found))


def _convert_once(module: Any) -> None:
    """Switch's routers convert their classifier's parameters to fp32 in every forward, which only the first changes."""
    classifier, dtype = getattr(module, "classifier", None), getattr(module, "dtype", None)
    if isinstance(classifier, nn.Linear) and isinstance(dtype, torch.dtype) and dtype != classifier.weight.dtype:
        classifier.to(dtype)
        classifier.to = types.MethodType(_as_it_is, classifier)  # type: ignore[assignment]


def _as_it_is(module: nn.Module, *_: Any) -> nn.Module:
    return module


def _rows(tokens: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor, imbalance: float,
          run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sort token copies by expert, `run(rows, expert of each)`, weigh the results and add them up: [tokens, hidden]."""
    pairs, top_k = selected.numel(), selected.size(-1)
    expert, order = torch.sort(selected.reshape(-1))
    rows = math.ceil(pairs * imbalance)
    if rows > pairs:
        padded = torch.arange(rows, device=order.device) % pairs
        expert, order = expert[padded], order[padded]
    source = order // top_k
    weighed = run(tokens[source], expert) * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(tokens).index_add(0, source, weighed.to(tokens.dtype))


# -- 3-D parameters -------------------------------------------------------------------------------
def _has_stacked_parameters(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return hasattr(module, "_apply_gate") and own.get("down_proj", torch.empty(0)).dim() == 3


def _stacked_parameters(module: Any, imbalance: float, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                        top_k_weights: torch.Tensor) -> torch.Tensor:
    def linear(name: str, rows: torch.Tensor, expert: torch.Tensor) -> Any:
        weight = getattr(module, name)
        weight = weight if getattr(module, "is_transposed", False) else weight.transpose(1, 2)
        out = torch.ops.meshwright_planner.grouped_mm(rows.to(weight.dtype), weight)
        return out + getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else out

    def run(rows: torch.Tensor, expert: torch.Tensor) -> Any:
        if getattr(module, "has_gate", True):
            inner = module._apply_gate(linear("gate_up_proj", rows, expert))
        else:
            inner = module.act_fn(linear("up_proj", rows, expert))
        out = linear("down_proj", inner, expert)
        return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out

    return _rows(hidden_states, top_k_index, top_k_weights, imbalance, run)


# -- containers -----------------------------------------------------------------------------------
def _is_container(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleDict, nn.ModuleList)) or "forward" not in vars(type(module)):
        return False
    if hasattr(module, NUMBER):
        return True
    shapes = [[(n, p.shape, p.dtype) for n, p in c.named_parameters()] for c in module.children()]
    return len(shapes) > 1 and bool(shapes[0]) and all(s == shapes[0] for s in shapes)


class _GroupedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, experts: int) -> None:
        super().__init__()
        self.weight = _stacked(linear.weight, experts)
        self.bias = None if linear.bias is None else _stacked(linear.bias, experts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.meshwright_planner.grouped_mm(rows, self.weight.transpose(1, 2))
        return out if self.bias is None else out + self.bias[0]  # a row reads one expert's bias, whichever it is


class _Experts(nn.Module):
    """E congruent experts as one whose linear layers hold E weights. `selected` is [T, k] or one-hot [T, k, E]."""

    def __init__(self, name: str, container: nn.Module, imbalance: float) -> None:
        super().__init__()
        experts = list(container.children())
        _refuse_others(name, container, experts[0])
        self.imbalance, self.expert = imbalance, nn.Sequential(copy.deepcopy(experts[0]))
        for path, module in list(self.expert.named_modules()):
            if isinstance(module, nn.Linear):
                _exchange(self.expert, path, _GroupedLinear(module, getattr(container, NUMBER, len(experts))))

    def forward(self, tokens: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = selected.argmax(-1) if selected.dim() == 3 else selected
        return _rows(tokens, chosen, weights, self.imbalance, lambda rows, _: self.expert(rows))


def _refuse_others(name: str, container: nn.Module, expert: nn.Module) -> None:
    linear = {p for m in expert.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    parameters = inspect.signature(type(container).forward).parameters
    if len(parameters) != 4 or any(p not in linear for p in expert.parameters()):
        raise UnsupportedError(
            f"the experts {name} ({type(container).__name__}) can't be captured without data",
            expected="forward(tokens, selected, weights) over experts whose weights are all in nn.Linear")


def _stacked(parameter: torch.Tensor, experts: int) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(experts, *parameter.shape), requires_grad=parameter.requires_grad)


def _exchange(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)

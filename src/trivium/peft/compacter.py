"""Compacter: bottlenecks whose matrices are sums of Kronecker products (Karimi Mahabadi et al. 2021, "Compacter:
Efficient Low-Rank Hypercomplex Adapter Layers", equations 4 and 5).

    h + U f(D h + b_d) + b_u,   where D and U are   sum_i  A_i (x) (s_i t_i)        i = 1 .. n

A: [n, n, n], one for all adapters of the model;  s_i t_i: of rank k. (d + r) k + r trained weights for D, (d + r) k + d
for U, n^3 once. After attention and MLP, or after the MLP only (Compacter++). The paper starts U from noise; here
its t is zero, so that the start is the base. The products are never written out: x A_i s_i t_i costs (d + r) k n.

Shapes:  N tokens (all leading dimensions),  d: width of the stream,  r: width of the bottleneck,  n: terms,  k: rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.errors import RecipeError
from trivium.peft import targets
from trivium.peft.bottleneck import FUNCTIONS, NonLinear, blocks, upper_layers
from trivium.peft.delta import Delta, Plan
from trivium.peft.kinds import CompacterSettings

RULE_SPREAD = 0.01  # of the shared factors at the start, as in the authors' code


class Rule(nn.Module):
    """The factors A that all adapters share."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n, dtype=torch.float32))


class PHM(nn.Module):
    """A linear map of parameterised hypercomplex multiplication; its factors A are given with every call."""

    def __init__(self, n_in: int, n_out: int, n: int, k: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(n, n_in // n, k, dtype=torch.float32))
        self.t = nn.Parameter(torch.empty(n, k, n_out // n, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(n_out, dtype=torch.float32))

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """``x [..., in]`` -> ``[..., out]``; ``rule [n, n, n]``."""
        n, dtype = len(rule), x.dtype
        s, t, a = self.s.to(dtype), self.t.to(dtype), rule.to(dtype)
        parts = x.unflatten(-1, (n, -1))
        low = torch.einsum("...pq,iqk->...ipk", parts, s)
        mixed = torch.einsum("...ipk,ipo->...iok", low, a)
        return torch.einsum("...iok,ikq->...oq", mixed, t).flatten(-2) + self.bias.to(dtype)


class Compacter(NonLinear):
    """The two maps of one block."""

    def __init__(self, d: int, r: int, rule: Rule, settings: CompacterSettings) -> None:
        super().__init__()
        n, k = settings.phm_dim, settings.phm_rank
        self.non_linearity = settings.non_linearity
        self.down, self.up, self.rule = PHM(d, r, n, k), PHM(r, d, n, k), rule

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.rule.A.copy_(torch.empty(self.rule.A.shape).normal_(0, RULE_SPREAD, generator=generator))
            for tensor in (self.down.s, self.down.t, self.up.s):
                start = torch.empty(tensor.shape)
                for one in start:  # one matrix for each term
                    nn.init.xavier_uniform_(one, generator=generator)
                tensor.copy_(start)
            for zero in (self.up.t, self.down.bias, self.up.bias):
                zero.zero_()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        narrow = FUNCTIONS[self.non_linearity](self.down(output, self.rule.A))
        wide: Tensor = self.up(narrow, self.rule.A)
        return output + wide.to(output.dtype)


def build(model: nn.Module, settings: CompacterSettings) -> Plan:
    """An adapter on every block of the placement. Raises RecipeError where the widths do not divide."""
    d = targets.width(model)
    r, n = settings.width_in(d), settings.phm_dim
    if d % n or r % n:
        raise RecipeError(
            f"phm_dim is {n}, which does not divide the widths {d} and {r}",
            "choose r and phm_dim so that it divides both",
        )
    rule = Rule(n)
    places = blocks(upper_layers(model, settings.skip_layers), settings.placement)
    made: dict[str, Delta] = {name: Compacter(d, r, rule, settings) for name in places}
    return Plan(made)

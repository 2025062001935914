"""Only the norms are trained (Zhao et al. 2024, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM
Finetuning", section 3): all of the decoder's, the last one before the head included.
"""

from __future__ import annotations

from torch import nn

from trivium.errors import ModelError
from trivium.peft.copies import own_tensors
from trivium.peft.delta import Plan
from trivium.peft.hub import CHILD
from trivium.peft.kinds import LayerNormSettings


def build(model: nn.Module, settings: LayerNormSettings) -> Plan:
    """A copy of every norm's own tensors. Raises ModelError for a model whose norms have none."""
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and CHILD not in n.split(".")]
    made = own_tensors(model, norms)
    if not made:
        raise ModelError(f"{type(model).__name__} has no norms with weights", "choose another method")
    return Plan(made)

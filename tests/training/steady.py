"""Models that train without dropout, so that two forwards of one batch are the same."""

from __future__ import annotations

from torch import nn

__all__ = ["still"]


def still(model: nn.Module) -> nn.Module:
    """Set every dropout to 0 and the model to train mode; return it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()

"""The one place that knows of Hugging Face's ``generate``: settings that wrapping a model must change and give back."""

from __future__ import annotations

import weakref

from torch import nn

_switched_off: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def on_wrap(model: nn.Module) -> None:
    """``generate`` would compile the model's call again for static caches; ours is compiled already."""
    settings = getattr(model, "generation_config", None)
    if settings is not None and not getattr(settings, "disable_compile", False):
        settings.disable_compile = True
        _switched_off.add(model)


def on_restore(model: nn.Module) -> None:
    """Give ``generate`` back what :func:`on_wrap` took."""
    if model in _switched_off:
        _switched_off.discard(model)
        model.generation_config.disable_compile = False  # type: ignore[union-attr]

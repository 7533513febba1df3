"""think-compile: key caches that really shrink, in any PyTorch decoder, through a torch.compile graph pass."""

from think_compile.api import explain, report, restore, think_compile
from think_compile.backend import NothingRewritten, ThinkWarning
from think_compile.config import ThinkConfig
from think_compile.report import LayerRecord, Report
from think_compile.runtime.program import CacheFull

__all__ = [
    "CacheFull",
    "LayerRecord",
    "NothingRewritten",
    "Report",
    "ThinkConfig",
    "ThinkWarning",
    "explain",
    "report",
    "restore",
    "think_compile",
]

"""think-compile: key caches that really shrink, in any PyTorch decoder, through a torch.compile graph pass."""

from think_compile.api import explain, report, restore, think_compile
from think_compile.backend import NothingRewritten, ThinkWarning
from think_compile.cache.store import NoDenseForm
from think_compile.config import ThinkConfig
from think_compile.formats.mustafar import Mustafar
from think_compile.formats.side import FormatError
from think_compile.formats.tokens.h2o import H2O
from think_compile.formats.tokens.kvcrush import KVCrush
from think_compile.formats.tokens.rule import RuleError, TokenRule
from think_compile.formats.tokens.snapkv import SnapKV
from think_compile.report import LayerRecord, Report
from think_compile.runtime.program import CacheFull

__all__ = [
    "H2O",
    "CacheFull",
    "FormatError",
    "KVCrush",
    "LayerRecord",
    "Mustafar",
    "NoDenseForm",
    "NothingRewritten",
    "Report",
    "RuleError",
    "SnapKV",
    "ThinkConfig",
    "ThinkWarning",
    "TokenRule",
    "explain",
    "report",
    "restore",
    "think_compile",
]

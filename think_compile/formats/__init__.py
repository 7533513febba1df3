"""Cache formats: how the keys and the values of a layer's cache are stored and read by attention.

The passes and the runtime use :mod:`.base` only. Every other file is a codec or a helper of the codecs.
"""

from think_compile.cache.state import Part, State
from think_compile.formats.seen import Seen

__all__ = ["Part", "Seen", "State"]

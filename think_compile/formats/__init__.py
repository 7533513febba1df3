"""Cache formats: how the two sides of a layer's cache are stored and attended to.

:mod:`.base` is all that the passes and the runtime know. Every other file is one codec, or serves the codecs.
"""

from think_compile.cache.state import Part, State
from think_compile.formats.seen import Seen

__all__ = ["Part", "Seen", "State"]

"""The layout of a cache tensor, derived from its use in an attention; and the layout of a tensor made from it.

Layouts are those of :mod:`think_compile.cache.canonical`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from think_compile.cache.canonical import AXES, CHANNEL, HEAD, NAMES, TOKEN, Layout
from think_compile.passes.layout import Atom, Axes, place, same_size
from think_compile.passes.refusal import Reason, Refused

_Piece = tuple[Atom, tuple[int, ...]]


def source_layout(axes: Axes, roles: Layout, shape: Sequence[Any]) -> Layout:
    """The layout of a source of ``shape``, given the ``axes`` and the layout ``roles`` of a tensor made from it.

    Raises:
        Refused: an axis of the source is not used, or a canonical axis is not one piece of the source.
    """
    pieces: dict[int | None, list[_Piece]] = {axis: [] for axis in range(len(shape))}
    for atoms, role in zip(axes, roles, strict=True):
        for atom, own_role in _assigned(atoms, role):
            pieces[atom.axis].append((atom, own_role))
    return _with_unit_axes([_joined(pieces[axis]) for axis in range(len(shape))], shape)


def _assigned(atoms: Sequence[Atom], role: tuple[int, ...]) -> Iterator[_Piece]:
    """The atoms of one axis with their canonical axes; only heads may be repeated."""
    own = [atom for atom in atoms if atom.axis is not None]
    repeated = any(atom.axis is None and not same_size(atom.size, 1) for atom in atoms)
    if len(own) > len(role):
        own = [atom for atom in own if not same_size(atom.size, 1)] or own[:1]
    if (repeated and role != (HEAD,)) or len(own) not in (0, 1, len(role)):
        raise _not_one_axis(role)
    if len(own) == 1:
        yield own[0], role
    else:
        yield from zip(own, ((axis,) for axis in role), strict=False)


def _joined(pieces: list[_Piece]) -> tuple[int, ...]:
    """The canonical axes of one source axis; its pieces must cover the whole axis."""
    pieces = sorted(pieces, key=lambda piece: place(piece[0].part))
    roles = tuple(axis for _, role in pieces for axis in role)
    if pieces and sum(0.5 ** len(place(atom.part)) for atom, _ in pieces) != 1:
        raise _not_one_axis(roles)
    return roles


def _not_one_axis(role: Sequence[int]) -> Refused:
    names = "".join(NAMES[axis] for axis in role)
    reason = Reason.CHANNEL_MIXING if CHANNEL in role else Reason.UNKNOWN_LAYOUT
    return Refused(reason, f"axis {names} is not one axis of the cache")


def _with_unit_axes(layout: list[tuple[int, ...]], shape: Sequence[Any]) -> Layout:
    """Assign missing canonical axes, dropped or merged by views, to source axes of size one."""
    present = [axis for axes in layout for axis in axes]
    missing = [axis for axis in AXES if axis not in present]
    for i, size in enumerate(shape):
        if not layout[i]:
            if not same_size(size, 1):
                raise Refused(Reason.UNKNOWN_LAYOUT, f"axis {i} of the cache takes no part in the attention")
            layout[i] = (missing.pop(0),) if missing else ()
    if len(set(present)) != len(present) or (TOKEN,) not in layout or CHANNEL in missing:
        raise Refused(Reason.UNKNOWN_LAYOUT, f"axes {[''.join(NAMES[a] for a in axes) for axes in layout]}")
    return tuple(layout)


def derived_layout(axes: Axes, layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout of a tensor with ``axes``, made from a tensor in ``layout`` of canonical shape ``shape``.

    Raises:
        Refused: the tensor holds copies, or its axes cut across canonical ones.
    """
    if any(atom.axis is None and not same_size(atom.size, 1) for atoms in axes for atom in atoms):
        raise Refused(Reason.UNKNOWN_LAYOUT, "the cache is kept repeated")
    parts: dict[int, set[int]] = {}
    for atom in _own(axes):
        parts.setdefault(atom.axis, set()).add(atom.part)
    ordered = {axis: sorted(found, key=place) for axis, found in parts.items()}
    return tuple(
        tuple(axis for atom in _own([atoms]) for axis in _roles_of(atom, ordered[atom.axis], layout, shape))
        for atoms in axes
    )


def _own(axes: Axes) -> Iterator[Atom]:
    return (atom for atoms in axes for atom in atoms if atom.axis is not None)


def _roles_of(atom: Atom, parts: list[int], layout: Layout, shape: Sequence[Any]) -> tuple[int, ...]:
    """The canonical axes of one atom of a source axis split into ``parts``."""
    assert atom.axis is not None
    roles = layout[atom.axis]
    if len(parts) == 1:
        return roles
    role = roles[parts.index(atom.part)] if len(parts) == len(roles) else None
    if role is None or not same_size(shape[role], atom.size):
        raise Refused(Reason.UNKNOWN_LAYOUT, "the cache is kept with axes cut anew")
    return (role,)


def same_layout(a: Layout | None, b: Layout | None, shape: Sequence[int]) -> bool:
    """Whether two layouts of one tensor are equal up to axes of size one."""

    def real(layout: Layout) -> list[tuple[int, ...]]:
        return [tuple(axis for axis in axes if shape[axis] != 1) for axes in layout]

    return a is not None and b is not None and real(a) == real(b)

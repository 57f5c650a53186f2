"""Which values share memory: views and what they are views of, as long as they live."""

from __future__ import annotations

from collections.abc import Collection


class Aliases:
    """``group``: live handles that share memory have one number here; absent: none does."""

    def __init__(self) -> None:
        self.group: dict[int, int] = {}
        self._members: dict[int, set[int]] = {}
        #: groups of those that were divided or joined, each handle for itself: they share memory no more
        self._parted: set[int] = set()

    def share(self, view: int, of: int, of_lives: bool) -> None:
        """``view`` shares memory with ``of``, which may be released already."""
        group = self.group.get(of)
        if group is None:
            group = of
            if of_lives:
                self._members.setdefault(group, set()).add(of)
                self.group[of] = group
        self._members.setdefault(group, set()).add(view)
        self.group[view] = group

    def release(self, handle: int) -> None:
        """Of one that shares memory."""
        group = self.group.pop(handle)
        members = self._members[group]
        members.discard(handle)
        if not members:
            del self._members[group]
            self._parted.discard(group)

    def sharing(self, handle: int) -> Collection[int]:
        """The live handles that share memory with this one, itself included."""
        group = self.group.get(handle)
        return (handle,) if group is None else self._members[group]

    def part(self, handle: int) -> None:
        """The value is about to be divided among servers, or joined: without those that shared its memory."""
        group = self.group.get(handle)
        if group is not None and len(self._members[group]) > 1:
            self._parted.add(group)

    def parted(self, handle: int) -> bool:
        """Whether others were made as views of the same memory, and that is no longer one."""
        group = self.group.get(handle)
        return group in self._parted and len(self._members[group]) > 1

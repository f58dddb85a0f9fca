"""Replay of blocks that have no numbers to compare."""

from recon.models.replay import Replay


class Unverified(Replay):
    """Replay of a fake model: without its check by numbers, and with one look at several equal blocks."""

    def verify(self) -> None:
        """Check nothing: `recon fit` verifies the real model."""
        self._known: dict[str, tuple[set[str], set[str]]] = {}  # dependencies, under names within the block

    def dependencies(self, index: int) -> tuple[set[str], set[str]]:
        """As `Replay.dependencies`."""
        block = self.anatomy.blocks[index]
        kind, prefix = str(block.module), len(block.name)
        if kind not in self._known:
            attention, mlp = super().dependencies(index)
            self._known[kind] = {name[prefix:] for name in attention}, {name[prefix:] for name in mlp}
        attention, mlp = self._known[kind]
        return {block.name + name for name in attention}, {block.name + name for name in mlp}

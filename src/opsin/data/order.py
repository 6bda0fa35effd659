"""The order of an epoch: every sample once, from places that can be read together.

Single files can be read in any order, and are. Samples in shards come in blocks of neighbours: the blocks are permuted,
and the samples of a window of blocks are shuffled together, so that at any time only a window's blocks are in use and
nearly every read falls close to another. Nothing is stored: position → index is arithmetic and two keyed permutations
(`shuffled_index`), in O(1) memory for a billion samples.
"""

from dataclasses import dataclass

import numpy as np

from opsin.data.rng import Integers, Stream, shuffled_index


@dataclass(frozen=True)
class Order:
    """A keyed bijection from the positions of every epoch to the samples."""

    samples: int
    """Samples in the source."""
    block: int = 1
    """Successive samples that stay together until the window is shuffled; with 1, any sample can follow any."""
    window: int = 1
    """Blocks that are shuffled together."""

    def indices(self, seed: int, position: Integers) -> Integers:
        """The samples at `position`, counted over all epochs from 0 on: shape and values depend on nothing else.

        The blocks are cut over all samples one after the other, and what is left over, fewer than a block, joins the
        last window of every epoch.
        """
        position = np.asarray(position, dtype=np.int64)
        epoch, at = np.divmod(position, self.samples)
        if self.block == 1:
            return shuffled_index(seed, epoch, at, self.samples)
        whole = self.samples // self.block
        windows = max(1, -(-self.samples // (self.block * self.window)))
        full = self.block * self.window
        number, inside = np.divmod(at, full)
        last = self.samples - (windows - 1) * full
        for here, size in ((number < windows - 1, full), (number == windows - 1, last)):
            key = epoch[here] * windows + number[here]
            inside[here] = shuffled_index(seed, key, inside[here], size, stream=Stream.WINDOW)
        slot, within = np.divmod(inside, self.block)
        block = number * self.window + slot
        ragged = block == whole
        block[~ragged] = shuffled_index(seed, epoch[~ragged], block[~ragged], whole)
        return block * self.block + within

"""Connected components of a graph whose edges come in any order and amount, with its nodes on disk.

A disjoint-set forest in a memory-mapped file of one 64-bit parent per node. Edges are joined a chunk at a time with
array operations: the chunk's roots are found, the small graph between them is solved in memory (scipy), and every
component points to its smallest node. So a component is named by its smallest node, whatever the order of the edges.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

# scipy comes with opsin[curate], and the command line must start without.

Numbers = NDArray[np.int64]

CHUNK: Final = 1 << 20
"""Edges that are joined, and nodes that are visited, at a time: some hundred megabytes."""


class Components:
    """The components of `nodes` nodes, each by itself at first."""

    def __init__(self, file: Path, nodes: int) -> None:
        """Make the file anew."""
        self.nodes = nodes
        self._parent = np.lib.format.open_memmap(file, mode="w+", dtype=np.int64, shape=(nodes,))
        for start in range(0, nodes, CHUNK):
            self._parent[start : start + CHUNK] = np.arange(start, min(start + CHUNK, nodes))

    def join(self, a: Numbers, b: Numbers) -> None:
        """Add the edges a[i] – b[i]."""
        for start in range(0, len(a), CHUNK):
            self._join(a[start : start + CHUNK], b[start : start + CHUNK])

    def _join(self, a: Numbers, b: Numbers) -> None:
        roots_a, roots_b = self.of(a), self.of(b)
        apart = roots_a != roots_b
        roots, index = np.unique(np.concatenate([roots_a[apart], roots_b[apart]]), return_inverse=True)
        if not len(roots):
            return
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        from_, to = np.split(index, 2)
        graph = coo_array((np.ones(len(from_), np.int8), (from_, to)), shape=(len(roots), len(roots)))
        count, label = connected_components(graph, directed=False)
        smallest = np.full(count, self.nodes)
        np.minimum.at(smallest, label, roots)
        self._parent[roots] = smallest[label]

    def of(self, nodes: Numbers) -> Numbers:
        """The component of every given node: the smallest node in it."""
        found = np.array(self._parent[nodes])
        while True:
            above = self._parent[found]
            if (above == found).all():
                break
            found = above
        self._parent[nodes] = found  # the next search has a short way
        return found

    def labels(self, start: int, stop: int) -> Numbers:
        """The components of the nodes `start` … `stop` - 1."""
        return self.of(np.arange(start, stop))

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from opsin.curate import components as module
from opsin.curate.components import Components


def smallest_of_each(nodes, a, b):
    """The smallest node of every node's component, as scipy finds the components of the whole graph."""
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(nodes, nodes))
    _, label = connected_components(graph, directed=False)
    return np.array([np.flatnonzero(label == each)[0] for each in label])


@st.composite
def graphs(draw):
    nodes = draw(st.integers(1, 60))
    node = st.integers(0, nodes - 1)
    pairs = draw(st.lists(st.tuples(node, node), max_size=90))
    return nodes, np.array(pairs, np.int64).reshape(-1, 2)


@settings(max_examples=150)
@given(graphs(), st.integers(1, 100), st.integers(1, 100), st.randoms(use_true_random=False))
def test_components_are_those_of_the_whole_graph_in_any_order_and_chunks(graph, chunk, batch, random):
    nodes, pairs = graph
    order = random.sample(range(len(pairs)), len(pairs))
    shuffled = pairs[order]
    with tempfile.TemporaryDirectory() as folder, patch.object(module, "CHUNK", chunk):
        components = Components(Path(folder) / "parents.npy", nodes)
        for start in range(0, len(shuffled), batch):
            components.join(*shuffled[start : start + batch].T)
        expected = smallest_of_each(nodes, *pairs.T)
        assert components.labels(0, nodes).tolist() == expected.tolist()
        some = np.array(random.choices(range(nodes), k=5))
        assert components.of(some).tolist() == expected[some].tolist()


def test_a_long_chain_has_the_name_of_its_smallest_node(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    nodes = 5000
    order = np.random.default_rng(0).permutation(nodes - 11) + 10  # nodes 0 … 9 stay by themselves
    components = Components(tmp_path / "parents.npy", nodes)
    components.join(order + 1, order)
    assert components.labels(0, nodes).tolist() == [*range(10), *[10] * (nodes - 10)]


def test_nodes_without_edges_are_components_of_their_own(tmp_path):
    components = Components(tmp_path / "parents.npy", 7)
    components.join(np.empty(0, np.int64), np.empty(0, np.int64))
    components.join(np.array([3]), np.array([3]))
    assert components.labels(2, 6).tolist() == [2, 3, 4, 5]
    assert components.of(np.empty(0, np.int64)).tolist() == []

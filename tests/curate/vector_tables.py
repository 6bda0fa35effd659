"""Tables of vectors for tests of curation, and what brute force finds in them."""

import numpy as np
import pyarrow as pa
import torch

from opsin.curate.engine import Engine
from opsin.curate.tables import Table, write_part
from opsin.curate.vectors import vector_array

ENGINE = Engine(threads=1, memory=0.2)


def tiny(size):
    """An engine with so few bytes for a task that everything is cut into many pieces, done one after the other."""
    engine = Engine()
    object.__setattr__(engine, "memory", size / 1e9)
    return engine


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def directions(count, dimensions=16, seed=0):
    """Vectors of unit length in all directions."""
    return unit(np.random.default_rng(seed).standard_normal((count, dimensions)))


def concepts(count, dimensions=16, centres=20, spread=0.2, seed=0):
    """Vectors of unit length in groups around some centres, and the group of each."""
    random = np.random.default_rng(seed)
    group = random.integers(0, centres, count)
    mixed = random.standard_normal((centres, dimensions))[group] + spread * random.standard_normal((count, dimensions))
    return unit(mixed), group


def halves(count, seed=0):
    """Vectors with four of eight entries ±1/2: their products are exact, and many are equal."""
    random = np.random.default_rng(seed)
    vectors = np.zeros((count, 8))
    for vector in vectors:
        vector[random.choice(8, 4, replace=False)] = random.choice([-0.5, 0.5], 4)
    return vectors


def write_vectors(folder, vectors, part=100, missing=(), reasons=None, column="semantic"):
    """A table with these vectors, null at the rows `missing`; `reasons` is a dictionary by row."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = torch.from_numpy(np.asarray(vectors, np.float32))
    for number, start in enumerate(range(0, len(vectors), part)):
        rows = np.arange(start, min(start + part, len(vectors)))
        there = rows[~np.isin(rows, list(missing))]
        columns = {column: vector_array(vectors[torch.from_numpy(there)], there - start, len(rows))}
        if reasons is not None:
            columns["reason"] = pa.array([reasons.get(row) for row in rows.tolist()], pa.string())
        write_part(folder / f"part-{number:08d}.parquet", pa.table(columns))
    return Table(folder)


def stored(vectors):
    """Vectors as cells hold them: of unit length, from a table in fp16, rounded to fp16 again."""
    given = torch.from_numpy(np.asarray(vectors, np.float32)).half().float()
    return (given / given.norm(dim=1, keepdim=True)).half().float().numpy()


def same_neighbours(found, products, k, floor, itself):
    """Check rows of a search, {number: (neighbours, similarities)}, against products `[queries, base]`."""
    for number, row in enumerate(products):
        among = np.flatnonzero(row > floor)
        if itself:
            among = among[among != number]
        best = among[np.lexsort((among, -row[among]))][:k]
        neighbours, similarities = found.get(number, ([], []))
        np.testing.assert_allclose(similarities, row[best], atol=2e-6)
        np.testing.assert_allclose(row[neighbours], similarities, atol=2e-6)
        assert len(set(neighbours)) == len(neighbours) == len(best)
        assert not (itself and number in neighbours)

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.decomposition import PCA
from vector_tables import ENGINE, concepts, directions, unit, write_vectors

from opsin.curate.tables import Part, Table, write_part
from opsin.curate.vectors import Column, read_vectors, read_whitening, save_whitening, unit_vectors, vector_array, width
from opsin.curate.whiten import whitening
from opsin.errors import OpsinError

KINDS = {"fp16": pa.float16(), "fp32": pa.float32(), "fp64": pa.float64()}
LISTS = {"list": lambda kind, _: pa.list_(kind), "large": lambda kind, _: pa.large_list(kind), "fixed": pa.list_}
PART = Part(None, 0, 1000, 0)


def save(folder, *columns):
    """A table with a part for each array, in the column `v`."""
    folder.mkdir()
    for number, column in enumerate(columns):
        write_part(folder / f"{number}.parquet", pa.table({"v": column}))
    return Table(folder)


@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(LISTS)),
    st.integers(1, 5).flatmap(
        lambda d: st.lists(
            st.none() | arrays.arrays(np.float16, d, elements=st.sampled_from([-3, -0.5, 0.25, 1, 7])), max_size=12
        ).map(lambda rows: (d, rows))
    ),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_lists_of_any_kind_with_nulls_and_sliced_become_unit_vectors(number, kind, content, before, after):
    d, rows = content
    array = pa.array([None if row is None else row.tolist() for row in rows], LISTS[kind](KINDS[number], d))
    array = array[before : len(rows) - after] if before + after <= len(rows) else array[:0]
    rows = rows[before : len(rows) - after] if before + after <= len(rows) else []
    vectors, there = unit_vectors(pa.chunked_array([array]), PART, Column("v"), d)
    assert there.tolist() == [i for i, row in enumerate(rows) if row is not None]
    expected = [row.astype(float) / np.linalg.norm(row.astype(float)) for row in rows if row is not None]
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors.numpy(), np.array(expected).reshape(-1, d), atol=1e-6)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("number", KINDS)
def test_vectors_are_read_from_parquet(tmp_path, number, kind):
    given = np.random.default_rng(0).normal(size=(20, 6))
    array = pa.array([row.astype(np.float16).tolist() for row in given], LISTS[kind](KINDS[number], 6))
    table = save(tmp_path / "t", array[:7], array[7:])
    assert width(table, "v") == 6
    vectors, there = read_vectors(table.parts[1], Column("v"), 6)
    assert there.tolist() == list(range(13))
    torch.testing.assert_close(vectors, torch.from_numpy(unit(given.astype(np.float16)[7:])).float())


def test_vectors_that_are_written_are_read_again(tmp_path):
    given = torch.from_numpy(directions(5, 4)).float()
    there = np.array([0, 3, 4, 8, 9])
    table = save(tmp_path / "t", vector_array(given[:0], there[:0], 6), vector_array(given, there, 11))
    assert table.schema.field("v").type.value_type == pa.float16()
    assert width(table, "v") == 4
    assert len(read_vectors(table.parts[0], Column("v"), 4)[0]) == 0
    vectors, rows = read_vectors(table.parts[1], Column("v"), 4)
    assert rows.tolist() == there.tolist()
    torch.testing.assert_close(vectors, given, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([1.0, 2.0]), "holds double, not lists of floats"),
        (pa.array([[1, 2]]), "holds list<.*: int64>, not lists of floats"),
        (pa.array([["a"]]), "not lists of floats"),
        (pa.array([None, None], pa.list_(pa.float32())), "holds no vectors"),
        (pa.array([[]], pa.list_(pa.float32())), "holds no vectors"),
    ],
)
def test_columns_without_vectors_are_named(tmp_path, column, said):
    with pytest.raises(OpsinError, match=said):
        width(save(tmp_path / "t", column), "v")


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(OpsinError, match=r"has no column 'copies' \(it has v\)"):
        width(save(tmp_path / "t", pa.array([[1.0]])), "copies")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[1.0, 2.0], None, [3.0, 4.0, 5.0]], "row 1,002 of .* has a vector of 3 numbers in 'v', others 2"),
        ([[1.0, 2.0, 3.0], [4.0]], "row 1,000 of .* has a vector of 3 numbers in 'v', others 2"),  # 4 numbers in all
        ([[1.0, 2.0], []], "row 1,001 of .* has a vector of 0 numbers in 'v', others 2"),
        ([None, [1.0, float("nan")]], "row 1,001 of .* has a vector with a NaN or infinity in 'v'"),
        (
            [[1.0, 0.0], [float("inf"), 1.0], [0.0, 0.0]],
            r"row 1,001 .* a NaN or infinity in 'v' \(2 such in this part\)",
        ),
        ([[1.0, 0.0], [None, 1.0]], "row 1,001 of .* a NaN or infinity in 'v'"),
        ([[1.0, 0.0], [0.0, -0.0]], r"row 1,001 of .* a vector with zeros only in 'v' \(1 such in this part\)"),
    ],
)
@pytest.mark.parametrize("number", KINDS)
def test_vectors_that_cannot_be_compared_are_named(tmp_path, rows, said, number):
    table = save(tmp_path / "t", pa.array(rows, pa.list_(KINDS[number])))
    part = Part(table.parts[0].file, 0, 1000, len(rows))
    with pytest.raises(OpsinError, match=said) as caught:
        read_vectors(part, Column("v"), 2)
    assert "\n" not in str(caught.value)


def test_fixed_lists_of_another_width_are_named(tmp_path):
    table = save(tmp_path / "t", pa.array([[1.0, 2.0, 3.0]] * 4, pa.list_(pa.float32(), 3)))
    with pytest.raises(OpsinError, match=r"row 0 of .* has a vector of 3 numbers in 'v', others 2"):
        read_vectors(table.parts[0], Column("v"), 2)


def whitened(file, vectors):
    mean, matrix = read_whitening(file)
    return (torch.from_numpy(vectors).float() - mean) @ matrix


def elongated(count, dimensions=12, seed=0):
    """Vectors that are all near one direction, and vary more along some axes than along others."""
    random = np.random.default_rng(seed)
    return unit(5 + random.standard_normal((count, dimensions)) * np.geomspace(0.1, 2, dimensions))


def test_whitened_vectors_have_the_identity_as_covariance(tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.curate.whiten.tasks_of", lambda parts, *_: [[part] for part in parts])
    vectors = elongated(3000)
    table = write_vectors(tmp_path / "t", vectors, part=450, missing=range(100, 200))
    column = whitening(ENGINE, table, "semantic", tmp_path / "whitening.safetensors")
    assert column == Column("semantic", tmp_path / "whitening.safetensors")
    seen = np.delete(vectors, range(100, 200), axis=0)
    after = whitened(column.whitening, seen)
    assert after.shape[1] == 12
    torch.testing.assert_close(after.mean(0), torch.zeros(12), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(after.T), torch.eye(12), atol=0.02, rtol=0)
    assert [path.name for path in tmp_path.iterdir() if path.name != "t"] == ["whitening.safetensors"]


def test_whitened_cosines_are_those_of_sklearn(tmp_path):
    vectors = elongated(500)
    table = write_vectors(tmp_path / "t", vectors, part=200)
    column = whitening(ENGINE, table, "semantic", tmp_path / "whitening.safetensors")
    read = torch.cat([read_vectors(part, column, 12)[0] for part in table.parts])
    torch.testing.assert_close(read.norm(dim=1), torch.ones(500))
    expected = unit(PCA(whiten=True).fit_transform(vectors))
    np.testing.assert_allclose((read @ read.T).numpy(), expected @ expected.T, atol=0.02)


def test_the_length_of_vectors_does_not_matter_to_their_whitening(tmp_path):
    vectors = elongated(400)
    lengths = np.random.default_rng(3).uniform(0.2, 30, (400, 1))
    read = []
    for name, rows in (("unit", vectors), ("any", vectors * lengths)):
        (tmp_path / name).mkdir()
        table = save(tmp_path / name / "t", pa.array(list(rows)))
        column = whitening(ENGINE, table, "v", tmp_path / name / "whitening.safetensors")
        read.append(read_vectors(table.parts[0], column, 12)[0])
    torch.testing.assert_close(*read, atol=1e-4, rtol=0)


def test_directions_without_variance_and_more_than_a_quarter_of_the_vectors_are_left_out(tmp_path):
    flat = np.zeros((1000, 10))
    flat[:, :6] = np.random.default_rng(0).standard_normal((1000, 6)) + 1
    column = whitening(ENGINE, write_vectors(tmp_path / "flat", unit(flat)), "semantic", tmp_path / "flat.safetensors")
    assert read_whitening(column.whitening)[1].shape == (10, 6)
    few = write_vectors(tmp_path / "few", directions(33, 16))
    column = whitening(ENGINE, few, "semantic", tmp_path / "few.safetensors")
    assert read_whitening(column.whitening)[1].shape == (16, 8)


def test_the_directions_kept_are_those_of_the_largest_variance(tmp_path):
    variances = torch.tensor([3.0, 0.5, 1e-6, 2.0, 1.0])
    assert save_whitening(tmp_path / "w.safetensors", torch.zeros(5), torch.diag(variances), most=3) == 3
    _, matrix = read_whitening(tmp_path / "w.safetensors")
    assert matrix.abs().sum(1).nonzero()[:, 0].tolist() == [0, 3, 4]
    assert save_whitening(tmp_path / "v.safetensors", torch.zeros(5), torch.diag(variances), most=5) == 4


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.tile(directions(1), (100, 1)), "are all alike but for rounding"),
        (unit(np.tile(directions(1), (100, 1)) + 1e-4 * directions(100)), "are all alike but for rounding"),
        (directions(15), "15 vectors are too few to whiten them"),
    ],
)
def test_vectors_that_cannot_be_whitened_are_refused(tmp_path, vectors, said):
    table = write_vectors(tmp_path / "t", vectors)
    with pytest.raises(OpsinError, match=said):
        whitening(ENGINE, table, "semantic", tmp_path / "whitening.safetensors")
    assert not (tmp_path / "whitening.safetensors").exists()


def test_a_whitening_is_computed_once_and_goes_on_after_it_was_stopped(tmp_path, monkeypatch):
    bad = concepts(300)[0]
    bad[250] = np.nan
    file = tmp_path / "whitening.safetensors"
    with pytest.raises(OpsinError, match="a NaN or infinity"):
        whitening(ENGINE, write_vectors(tmp_path / "bad", bad, part=20), "semantic", file)
    (tmp_path / "moments").mkdir(exist_ok=True)
    (tmp_path / "moments" / "00000007.npy").write_bytes(b"half-writ")
    good = write_vectors(tmp_path / "good", concepts(300)[0])
    column = whitening(ENGINE, good, "semantic", file)
    before = file.stat().st_mtime_ns
    assert whitening(ENGINE, good, "semantic", file) == column
    assert file.stat().st_mtime_ns == before

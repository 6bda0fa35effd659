import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.curate.tables import SCRATCH, STEP, Part, Step, Table, read, read_step, tasks_of, write_part
from opsin.errors import OpsinError

ANY = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def save(folder, *sizes):
    """A folder of files with 0, 1, 2, … in the column `a`, each file in row groups of the given sizes."""
    folder.mkdir(parents=True)
    first = 0
    for number, groups in enumerate(sizes):
        with pq.ParquetWriter(folder / f"part-{number:08d}.parquet", pa.schema({"a": pa.int64()})) as file:
            for rows in groups:
                file.write_table(pa.table({"a": np.arange(first, first + rows)}), row_group_size=max(1, rows))
                first += rows
    return Table(folder)


def test_parts_are_row_groups_in_the_order_of_the_files(tmp_path, monkeypatch):
    table = save(tmp_path / "t", [3, 5], [2], [4, 1, 1])
    assert table.rows == 16
    assert [(part.first, part.rows, part.group) for part in table.parts] == [
        (0, 3, 0),
        (3, 5, 1),
        (8, 2, 0),
        (10, 4, 0),
        (14, 1, 1),
        (15, 1, 2),
    ]
    assert np.concatenate([read(part, ["a"])["a"].to_numpy() for part in table.parts]).tolist() == list(range(16))
    file = Table(tmp_path / "t" / "part-00000002.parquet")
    assert [part.first for part in file.parts] == [0, 4, 5]
    assert read(file.parts[1], ["a"])["a"].to_pylist() == [14]
    monkeypatch.chdir(tmp_path)
    assert Table(Path("t")).path == table.path  # workers may have another folder


def test_a_part_is_read_as_one_chunk_with_the_columns_asked_for(tmp_path):
    write_part(tmp_path / "t.parquet", ANY)
    found = read(Table(tmp_path / "t.parquet").parts[0], ["b"])
    assert found.column_names == ["b"]
    assert found["b"].num_chunks == 1


def test_what_is_written_is_one_row_group_and_no_partial_file_stays(tmp_path):
    big = pa.table({"a": np.arange(3_000_000)})
    write_part(tmp_path / "t.parquet", big)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    (part,) = Table(tmp_path / "t.parquet").parts
    assert read(part, ["a"]).equals(big)
    write_part(tmp_path / "none.parquet", big.slice(0, 0))
    assert Table(tmp_path / "none.parquet").rows == 0


def test_a_part_that_cannot_be_written_leaves_nothing_half_done(tmp_path, monkeypatch):
    write_part(tmp_path / "t.parquet", ANY)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OpsinError, match="No space left on device; free some space and give the same command again"):
        write_part(tmp_path / "t.parquet", ANY.slice(1))
    monkeypatch.undo()
    assert pq.read_table(tmp_path / "t.parquet").equals(ANY)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, "there is no table"),
        (lambda path: path.mkdir(), "holds no .parquet files"),
        (lambda path: path.write_bytes(b"PAR1 and no more"), "is half-written or damaged"),
        (lambda path: (path.mkdir(), (path / "a.parquet").write_bytes(b"")), "a.parquet is half-written or damaged"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, make, said):
    make(tmp_path / "t")
    with pytest.raises(OpsinError, match=said) as caught:
        Table(tmp_path / "t")
    assert str(tmp_path / "t") in sentence(caught)


def test_a_half_written_file_is_named(tmp_path):
    save(tmp_path / "t", [300], [200])
    file = tmp_path / "t" / "part-00000001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        OpsinError, match=r"part-00000001.parquet is half-written or damaged \(.*\): remove it"
    ) as caught:
        Table(tmp_path / "t")
    sentence(caught)


def test_a_file_damaged_inside_or_gone_meanwhile_is_named(tmp_path):
    table = save(tmp_path / "t", [3000], [200])
    whole = table.parts[0].file.read_bytes()
    table.parts[0].file.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(OpsinError, match=r"part-00000000.parquet is half-written or damaged") as caught:
        read(table.parts[0], ["a"])
    sentence(caught)
    table.parts[1].file.unlink()
    with pytest.raises(OpsinError, match=r"part-00000001.parquet has vanished: give the command that wrote it again"):
        read(table.parts[1], ["a"])


def test_files_of_different_tables_in_one_folder_are_refused(tmp_path):
    write_part(tmp_path / "1.parquet", ANY)
    write_part(tmp_path / "2.parquet", ANY.drop_columns("b"))
    with pytest.raises(OpsinError, match=r"2.parquet has no column 'b', which 1.parquet has"):
        Table(tmp_path)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_part(tmp_path / "t.parquet", ANY)
    table = Table(tmp_path / "t.parquet")
    table.require("a", "b")
    with pytest.raises(OpsinError, match=r"has no column 'c' \(it has a, b\)"):
        table.require("a", "c")


def test_tables_of_different_images_are_refused(tmp_path):
    one, two, three = save(tmp_path / "1", [3, 4]), save(tmp_path / "2", [3], [4]), save(tmp_path / "3", [4], [3])
    one.aligned(two)
    with pytest.raises(OpsinError, match=r"\(7 rows in 2 parts\) .* \(7 in 2\) are not of the same images"):
        one.aligned(three)


def test_a_digest_names_the_contents(tmp_path):
    table = save(tmp_path / "t", [3], [4])
    before = table.digest
    assert Table(tmp_path / "t").digest == before
    write_part(tmp_path / "t" / "part-00000001.parquet", pa.table({"a": [1, 2, 3, 5]}))
    assert Table(tmp_path / "t").digest != before
    folder = tmp_path / "step"
    step = Step(folder, "some", {"x": 1})
    write_part(step.part(0), ANY)
    step.finish({})
    made = Table(folder).digest
    os.utime(step.part(0), (1, 1))  # a copy of the folder is the same table
    assert Table(folder).digest == made
    step.finish({"found": 2})
    assert Table(folder).digest != made


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120), st.data())
def test_tasks_hold_successive_parts_of_so_many_rows(rows, most, data):
    parts = sorted(data.draw(st.sets(st.sampled_from(range(len(rows)))) if rows else st.just(set())))
    tasks = tasks_of(parts, rows, most)
    assert [part for task in tasks for part in task] == parts
    for task in tasks:
        assert len(task) == 1 or sum(rows[part] for part in task) <= most
    for task, following in pairwise(tasks):
        assert sum(rows[part] for part in [*task, following[0]]) > most  # and no task is smaller than it must be


def test_a_step_is_begun_gone_on_with_and_finished(tmp_path):
    source = save(tmp_path / "source", [3])
    step = Step(tmp_path / "out", "some", {"levels": (3, 1), "k": None}, {"vectors": source})
    assert not step.done
    assert step.missing(3) == [0, 1, 2]
    write_part(step.part(1), ANY)
    (step.scratch / "file").write_text("")
    with pytest.raises(OpsinError, match="is not finished: give the command that writes it again, it goes on"):
        Table(tmp_path / "out")
    again = Step(tmp_path / "out", "some", {"levels": (3, 1), "k": None}, {"vectors": source})
    assert again.missing(3) == [0, 2]
    assert (again.scratch / "file").exists()
    assert again.finish({"images": 3}) == {"images": 3} == again.facts
    assert not (tmp_path / "out" / SCRATCH).exists()
    third = Step(tmp_path / "out", "some", {"levels": (3, 1), "k": None}, {"vectors": source})
    assert third.done
    assert third.facts == {"images": 3}
    assert read_step(tmp_path / "out")["settings"] == {"levels": [3, 1], "k": None}
    assert Table(tmp_path / "out").rows == 3


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("name", "settings", "inputs", "changed"),
    [
        ("some", {"x": 2, "y": 1}, "same", "x"),
        ("some", {"x": 2, "y": 2}, "same", "x, y"),
        ("some", {"x": 1}, "same", "y"),
        ("some", {"x": 1, "y": 1, "z": 1}, "same", "z"),
        ("some", {"x": 1, "y": 1}, "other", "vectors"),
        ("some", {"x": 1, "y": 1}, "none", "vectors"),
        ("other", {"x": 1, "y": 1}, "same", "step"),
    ],
)
def test_a_step_made_with_other_settings_or_tables_is_refused(tmp_path, name, settings, inputs, changed, done):
    same = save(tmp_path / "source", [3])
    step = Step(tmp_path / "out", "some", {"x": 1, "y": 1}, {"vectors": same})
    if done:
        step.finish({})
    before = (tmp_path / "out" / STEP).read_bytes()
    given = {"same": {"vectors": same}, "none": {}, "other": {"vectors": save(tmp_path / "other", [3, 1])}}[inputs]
    with pytest.raises(
        OpsinError, match=f"was made with other {changed}: give those again, remove the folder"
    ) as caught:
        Step(tmp_path / "out", name, settings, given)
    assert str(tmp_path / "out") in sentence(caught)
    assert (tmp_path / "out" / STEP).read_bytes() == before


@pytest.mark.parametrize("content", ['{"step": "some", "sett', ""])
def test_a_damaged_step_file_is_named(tmp_path, content):
    Step(tmp_path / "out", "some", {})
    (tmp_path / "out" / STEP).write_text(content)
    for act in (lambda: Step(tmp_path / "out", "some", {}), lambda: read_step(tmp_path / "out")):
        with pytest.raises(OpsinError, match=f"{STEP} is missing or damaged .*: remove the folder and give") as caught:
            act()
        sentence(caught)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsinError, match="cannot write into --out"):
        Step(tmp_path / "file" / "out", "some", {})


def stopped(folder):
    """A step that stopped for its settings to be changed, and the parts that it had begun to write after that."""
    step = Step(folder, "some", {"x": 1})
    (step.scratch / "file").write_text("")
    step.note({"pairs": 7})
    return step


def test_a_step_that_stopped_by_itself_keeps_what_it_found_and_is_not_done(tmp_path):
    assert not stopped(tmp_path / "out").done
    assert read_step(tmp_path / "out")["found"] == {"pairs": 7}
    again = Step(tmp_path / "out", "some", {"x": 1})
    assert not again.done
    assert not (tmp_path / "out" / SCRATCH / "file").exists()
    assert again.finish({"kept": 1}) == {"kept": 1}
    assert Step(tmp_path / "out", "some", {"x": 1}).done


def test_a_step_that_stopped_by_itself_may_be_given_other_settings(tmp_path):
    stopped(tmp_path / "out")
    changed = Step(tmp_path / "out", "some", {"x": 2})
    about = json.loads((tmp_path / "out" / STEP).read_text())
    assert about["settings"] == {"x": 2}
    assert "found" not in about
    assert not (tmp_path / "out" / SCRATCH / "file").exists()
    changed.finish({})
    with pytest.raises(OpsinError, match="was made with other x"):
        Step(tmp_path / "out", "some", {"x": 3})


def test_parts_of_other_settings_are_not_taken_over(tmp_path):
    write_part(stopped(tmp_path / "out").part(0), ANY)  # gone on with, and killed
    assert Step(tmp_path / "out", "some", {"x": 1}).missing(2) == [1]
    assert Step(tmp_path / "out", "some", {"x": 2}).missing(2) == [0, 1]


def test_a_finished_step_that_had_stopped_before_is_protected_as_any(tmp_path):
    stopped(tmp_path / "out")
    again = Step(tmp_path / "out", "some", {"x": 1})
    write_part(again.part(0), ANY)
    again.finish({})
    with pytest.raises(OpsinError, match="was made with other x"):
        Step(tmp_path / "out", "some", {"x": 2})
    assert Table(tmp_path / "out").parts == [Part(tmp_path / "out" / "part-00000000.parquet", 0, 0, 3)]

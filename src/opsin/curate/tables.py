"""Tables in Parquet parts, and the folder of a step: what it was made with, which parts are there, what is left to do.

All tables of a curation have one row per image, in the same order and in the same parts, so no step has to join: row r
of part p is the same image everywhere. A row's number, counted over all parts, is the image's number.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

import opsin
from opsin.data.decode import shown
from opsin.errors import OpsinError
from opsin.output import make_folder, write

# Readers of Parquet folders pass over names that begin with an underscore.
LISTING: Final = "_listing"
"""In the folder of images: listings and indices of the sources."""
SCRATCH: Final = "_scratch"
"""In the folder of a step: what it needs until it is done."""
STEP: Final = "_step.json"
"""In the folder of a step: what it was made with and, once done, what it found."""


@dataclass(frozen=True)
class Part:
    """Successive rows of a table that are read together: a row group."""

    file: Path
    """The Parquet file."""
    group: int
    """Number of the row group in it."""
    first: int
    """Number of its first row in the table."""
    rows: int
    """Its rows."""


class Table:
    """A Parquet file or a folder of them, in the order of their names; every row group is a part."""

    def __init__(self, path: Path) -> None:
        """Read the footers.

        Raises:
            OpsinError: there is no such file or folder, it holds no Parquet, a step that writes it is not done, or a
                file is damaged.
        """
        self.path = Path(path).absolute()
        if not self.path.exists():
            raise OpsinError(f"there is no table {shown(path)}: give a Parquet file or a folder of them.")
        if (self.path / STEP).exists() and not read_step(self.path).get("done"):
            raise OpsinError(f"{shown(path)} is not finished: give the command that writes it again, it goes on.")
        files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not files:
            raise OpsinError(f"{shown(path)} holds no .parquet files: give a Parquet file or a folder of them.")
        self.schema: pa.Schema = _footer(files[0]).schema.to_arrow_schema()
        groups: list[tuple[Path, int, int]] = []
        for file in files:
            about = _footer(file)
            lost = {*self.schema.names} - {*about.schema.to_arrow_schema().names}
            if lost:
                raise OpsinError(
                    f"{shown(file)} has no column '{min(lost)}', which {files[0].name} has: give a folder with the "
                    "files of one table."
                )
            groups += [(file, i, about.row_group(i).num_rows) for i in range(about.num_row_groups)]
        starts = [0, *accumulate(rows for _, _, rows in groups)]
        self.parts = [Part(file, i, start, rows) for (file, i, rows), start in zip(groups, starts, strict=False)]
        self.rows = starts[-1]

    @cached_property
    def digest(self) -> str:
        """Names the table's contents: by how it was made, or else by its files' names, sizes and times."""
        step = self.path / STEP
        if step.exists():
            return hashlib.sha256(step.read_bytes()).hexdigest()[:16]
        try:
            files = {part.file: part.file.stat() for part in self.parts}
        except OSError as error:
            raise damaged(Path(error.filename), error) from None
        told = [(file.name, about.st_size, about.st_mtime_ns) for file, about in files.items()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def require(self, *columns: str) -> None:
        """Raise an OpsinError unless these columns are there."""
        for column in columns:
            if column not in self.schema.names:
                raise OpsinError(
                    f"{shown(self.path)} has no column '{column}' (it has {', '.join(self.schema.names)}): give the "
                    "table of another step, or name the column."
                )

    def aligned(self, other: "Table") -> None:
        """Raise an OpsinError unless the other table has the same rows in the same parts."""
        if [part.rows for part in self.parts] != [part.rows for part in other.parts]:
            raise OpsinError(
                f"{shown(self.path)} ({self.rows:,} rows in {len(self.parts)} parts) and {shown(other.path)} "
                f"({other.rows:,} in {len(other.parts)}) are not of the same images: give tables of one curation."
            )


def read(part: Part, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part, each as one chunk.

    Raises:
        OpsinError: the file is gone or damaged.
    """
    try:
        file = pq.ParquetFile(part.file)
        return file.read_row_group(part.group, list(columns), use_threads=False).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise damaged(part.file, error) from None


def damaged(file: Path, error: Exception) -> OpsinError:
    """What to say of a Parquet file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return OpsinError(f"{shown(file)} has vanished: give the command that wrote it again, or restore it.")
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return OpsinError(
        f"{shown(file)} is half-written or damaged ({reason}): remove it and give the command that wrote it again."
    )


def _footer(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise damaged(file, error) from None


def write_part(path: Path, table: pa.Table) -> None:
    """Write a part whole or not at all, as one row group.

    Raises:
        OpsinError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]  # numbers are read 4 times slower
    try:
        pq.write_table(table, partial, row_group_size=max(1, table.num_rows), compression="zstd", use_dictionary=texts)
        partial.replace(path)
    except OSError as error:
        raise OpsinError(
            f"cannot write {shown(path)}: {error.strerror or error}; free some space and give the same command again: "
            "finished parts stay."
        ) from None


def read_step(folder: Path) -> dict[str, Any]:
    """What a step's folder says of itself: `step`, `settings`, `inputs`, `opsin`, and once `done`, its `facts`.

    A step that stopped by itself has what it had found in `found`.
    """
    try:
        found: dict[str, Any] = json.loads((folder / STEP).read_text())
        return found
    except (OSError, ValueError) as error:
        raise OpsinError(
            f"{shown(folder / STEP)} is missing or damaged ({error}): remove the folder and give the command again."
        ) from None


class Step:
    """The folder that a step of the curation writes, begun or gone on with.

    Its parts are `part-00000000.parquet`, …; what it needs meanwhile lies in `SCRATCH`. Settings and inputs other than
    those it was begun with are an error, since its parts would not belong together.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Table] | None = None
    ) -> None:
        """Begin the step, or see what is left of it.

        Args:
            folder: where it writes.
            name: of the step.
            settings: all that decides its result, as JSON can hold it.
            inputs: tables that it reads, by the names that options give them.

        Raises:
            OpsinError: it was begun with other settings or inputs, or the folder cannot be written.
        """
        self.folder = make_folder(Path(folder).absolute())
        made = {
            "step": name,
            "settings": json.loads(json.dumps(settings)),
            "inputs": {key: table.digest for key, table in (inputs or {}).items()},
        }
        before = read_step(self.folder) if (self.folder / STEP).exists() else None
        if before is not None and "found" in before:  # it stopped for its settings to be changed
            if any(before[key] != made[key] for key in made):
                before = None
                for part in self.folder.glob("part-*.parquet"):  # of a run that went on, and was killed
                    part.unlink()
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        if before is not None:
            changed = [] if before["step"] == name else ["step"]
            for kind in ("settings", "inputs"):
                keys = {*before[kind], *made[kind]}
                changed += sorted(key for key in keys if before[kind].get(key) != made[kind].get(key))
            if changed:
                raise OpsinError(
                    f"{shown(self.folder)} was made with other {', '.join(changed)}: give those again, remove the "
                    "folder to make it anew, or choose another --out."
                )
        self._made = before or {**made, "opsin": opsin.__version__}
        if before is None:
            self._write()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self._made.get("done"))

    @property
    def facts(self) -> dict[str, Any]:
        """What the finished step found."""
        facts: dict[str, Any] = self._made["facts"]
        return facts

    @property
    def scratch(self) -> Path:
        """A folder for intermediate files, removed when the step is done."""
        return make_folder(self.folder / SCRATCH)

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:08d}.parquet"

    def missing(self, parts: int) -> list[int]:
        """Numbers of the parts, of so many, that are not written yet."""
        return [number for number in range(parts) if not self.part(number).exists()]

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Mark the step as done with what it found, and remove its scratch folder."""
        self._made.pop("found", None)
        self._made |= {"done": True, "facts": json.loads(json.dumps(facts))}
        self._write()
        shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        return self.facts

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep what was found so far, of a step that stops before it is done."""
        self._made |= {"found": json.loads(json.dumps(facts))}
        self._write()

    def _write(self) -> None:
        try:
            write(self.folder / STEP, json.dumps(self._made, indent=1))
        except OSError as error:
            raise OpsinError(f"cannot write into {shown(self.folder)}: {error.strerror}; free some space.") from None


def tasks_of(parts: Iterable[int], rows: Sequence[int], most: int) -> list[list[int]]:
    """Successive parts put together into tasks of at most `most` rows each, and of one part at least."""
    tasks: list[list[int]] = []
    held = 0
    for part in parts:
        if not tasks or held + rows[part] > most:
            tasks.append([])
            held = 0
        tasks[-1].append(part)
        held += rows[part]
    return tasks

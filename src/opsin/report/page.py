"""One self-contained HTML page from plain dictionaries: what was measured, what it shows, and the pictures.

The page asks for nothing from outside (its content security policy forbids it), needs no script, and follows the
reader's light or dark setting.
"""

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from opsin.errors import OpsinError, unknown

SECTIONS = (
    "title",
    "subtitle",
    "summary",
    "steps",
    "table",
    "differences",
    "failed",
    "tasks",
    "costs",
    "says",
    "curves",
    "pca",
    "norms",
    "neighbours",
    "composition",
    "sizes",
    "clusters",
    "duplicates",
    "pairs",
    "dropped",
    "timings",
    "versions",
    "recipe",
    "settings",
)
"""The keys that a report may have, in the order of the page."""


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Render `report` as one HTML file; a section appears when its key is there. Text is escaped.

    - `title`, `subtitle`: text; the title is required.
    - `summary`, `timings`, `versions`: lists of `{"label": …, "value": …}`.
    - `table`: `{"headers": [text], "rows": [[cell]], "note": text}`, the note optional; a row's first cell names it.
      `steps` and `composition` of a curation are such tables too. `words`, if there, numbers the columns whose cells
      are lists of lines.
    - `says`: `{"shows": [text], "shows_not": [text]}`.
    - `curves`: list of `{"title": text, "png": picture}`, from `pictures.loss_curves`.
    - `pca`: `{"columns": [text], "rows": [[picture]]}`, from `pictures.pca_grid`.
    - `norms`: `columns` and `rows` from `pictures.norm_grid`, `histogram` from `pictures.norm_histogram`, a `table` as
      above, and as `limit` the number of medians above which a patch is an outlier (text).
    - `neighbours`: list of `{"query": {"image", "label"}, "nearest": [{"image", "label", "match"}]}`, from
      `pictures.neighbour_rows`; a match of None marks nothing.
    - `recipe`, `settings`: the YAML text.

    Of a curation, where a shot is `{"image": picture or None, "label": text, "place": text, "notes": [text]}`: an
    image, its name, where it lies, and what is said below it; `match`, if there and not None, frames or fades it.

    - `sizes`: list of `{"title", "png"}`, from `curation_pictures.cluster_sizes`.
    - `clusters`, `dropped`: list of `{"title": text, "notes": [text], "shots": [shot]}`.
    - `duplicates`: list of `{"kept": shot, "notes": [text], "shots": [shot]}`.
    - `pairs`: `{"threshold": text, "above": [pair], "below": [pair]}` of `{"similarity": text, "shots": [shot, shot]}`,
      the most similar first.

    Of a suite of evaluations:

    - `differences`, `costs`: tables as above.
    - `failed`: a list as `summary`.
    - `tasks`: list of `{"title": text, "notes": [text], "tables": [table], "pictures": [[{"title", "image"}]]}`, the
      tables with a `title` each, the pictures in rows.

    Pictures are data URIs. The file appears whole or not at all.

    Raises:
        OpsinError: a key is unknown, the title is missing, a picture is no data URI, or the file cannot be written.
    """
    for key in report:
        if key not in SECTIONS:
            raise unknown("report section", key, SECTIONS)
    if "title" not in report:
        raise OpsinError("a report needs a title: give report['title'].")
    html = _environment().get_template("template.html").render(report)
    _write_whole(Path(path), html)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("opsin", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = _embedded
    return environment


def _embedded(picture: str) -> str:
    """Let a picture through only if it travels inside the page."""
    if not picture.startswith("data:image/"):
        raise OpsinError(f"a report embeds its pictures as data URIs, not '{picture[:40]}': use opsin.report.pictures.")
    return picture


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A folder's name, and so a class's, may hold bytes that are no text: they are shown escaped.
            with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OpsinError(
            f"cannot write the report {path}: {error.strerror}; make room there or choose another place."
        ) from error

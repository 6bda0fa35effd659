"""Counters on the terminal for work that takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text


class Rate(ProgressColumn):
    """How much is done in a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Such as "images 1,234/s"; only the unit before it is known."""
        speed = task.finished_speed or task.speed
        return Text(self.unit if speed is None else f"{self.unit} {speed:,.0f}/s")


@contextmanager
def progress(what: str, total: int | None, unit: str, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts on, visibly if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(unit))
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

"""The progress bar of a training run: one line that fits the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

BAR = (6, 40)  # characters of the bar itself: at least beside numbers, and at most


class StepLine(ProgressColumn):
    """Steps and time left, the bar, and as many of the task's `numbers` as the width has room for.

    Numbers are dropped from the last one on, then the bar; steps and time left always stay.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        """Return the line of a task."""
        total = int(task.total or 0)
        left = task.time_remaining
        clock = "-:--" if left is None else _clock(left)
        head = f"step {int(task.completed):>{len(str(total))}}/{total}  {clock} left"
        numbers: Sequence[str] = task.fields["numbers"]
        room = self.console.width - len(head)

        def width(count: int) -> int:  # of the bar, with so many numbers
            return room - 2 - sum(2 + len(number) for number in numbers[:count])

        count = len(numbers)
        while count > 1 and width(count) < BAR[0]:
            count -= 1
        bar = min(width(count), BAR[1])
        done = round(bar * task.completed / total) if total else 0
        line = Text(head, no_wrap=True, overflow="crop")
        if bar >= BAR[0]:
            line.append("  ").append("━" * done, "bar.complete").append(
                "━" * (bar - done), "bar.back"
            )
        return line.append("".join(f"  {number}" for number in numbers[:count]))


def step_progress(console: Console) -> Progress:
    """Return a progress display whose tasks have a field `numbers`, most important first."""
    return Progress(StepLine(console), console=console)


def _clock(seconds: float) -> str:
    """Return 1:02:03, or 2:03 below an hour."""
    text = str(timedelta(seconds=int(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text

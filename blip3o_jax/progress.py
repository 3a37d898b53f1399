"""Show the progress of long work on stderr, in a line of at most WIDTH columns.

    joint 4/5  step 120/300  ETA 1:23  loss 2.31  ce 1.9

On a terminal the line stays in place, below what else is printed, and shows several pieces of work
where one contains another. Elsewhere a line is printed every INTERVAL seconds.

The ETA extrapolates the mean rate so far. What happens once, such as compiling the first step, is
shown in place of the ETA while it lasts, and its time is left out of the rate.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self

WIDTH = 80  # columns
INTERVAL = 5.0  # seconds between two lines that are not forced
REFRESHES = 4  # a second, on a terminal
LONGEST_TITLE = 32  # columns


class Progress:
    """Show `title`, how many of `total` are done, the ETA and further values.

    Args:
      title: what is done, such as "encode photos.tar".
      total: how much there is to do.
      before, after: words around the amounts: "step", "images".
      done: how much was done before; it counts for no rate.
      amount: the text of an amount.
      shown: whether anything is printed.
    """

    def __init__(
        self,
        title: str,
        total: float,
        *,
        before: str = "",
        after: str = "",
        done: float = 0,
        amount: Callable[[float], str] = "{:.0f}".format,
        shown: bool = True,
    ):
        self.title = title
        self.total = total
        self.done = done
        self._before = f"{before} " if before else ""
        self._after = f" {after}" if after else ""
        self._start = done
        self._amount = amount
        self._values: tuple[str, ...] = ()
        self._activity = ""  # what happens once, while it does
        self._once: set[Hashable] = set()
        self._left_out = 0.0  # seconds
        self._forced = False  # whether the last line is printed although the work was short
        self._lock = threading.RLock()
        self._began = self._next = time.monotonic()
        self._next += INTERVAL
        self._shown = shown and not _display.quiet
        if self._shown:
            _display.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, done: float, *values: str, now: bool = False) -> None:
        """Set how much is done, and the texts after the ETA, of which those are shown that fit.
        `now` prints a line wherever stderr leads.
        """
        with self._lock:
            self.done = done
            self._values = values
            self._forced |= now
            if now or time.monotonic() >= self._next:
                self._print()

    def advance(self, count: float, *values: str) -> None:
        """Add to what is done; see `update`."""
        with self._lock:
            self.update(self.done + count, *values)

    @contextlib.contextmanager
    def once(self, activity: str, key: Hashable = None) -> Iterator[None]:
        """Show `activity` in place of the ETA during the block and leave its time out, the first
        time only that it is called with this `key`.
        """
        if (activity, key) in self._once or self._activity:
            yield
            return
        self._once.add((activity, key))
        began = time.monotonic()
        with self._lock:
            self._activity = activity
            self._forced = True
            self._print()
        try:
            yield
        finally:
            with self._lock:
                self._activity = ""
                self._left_out += time.monotonic() - began

    def eta(self) -> float | None:
        """Return the seconds left, None where no rate is known yet."""
        seconds = time.monotonic() - self._began - self._left_out
        done = self.done - self._start
        return seconds / done * max(0.0, self.total - self.done) if done > 0 else None

    def line(self, width: int = WIDTH) -> str:
        """Return the present line, of at most `width` columns."""
        amounts = f"{self._amount(self.done)}/{self._amount(self.total)}"
        seconds = time.monotonic() - self._began
        if self._activity:
            time_left = self._activity
        elif self.done >= self.total:
            time_left = f"took {_duration(seconds)}"
        else:
            eta = self.eta()
            time_left = f"ETA {'unknown' if eta is None else _duration(eta)}"
        line = f"{self._before}{amounts}{self._after}  {time_left}"
        room = min(LONGEST_TITLE, width - len(line) - 2)
        if room > 3:  # less would be dots alone
            line = f"{_shortened(self.title, room)}  {line}"
        line = line[:width]
        for value in self._values:
            if len(line) + 2 + len(value) > width:
                break
            line += f"  {value}"
        return line

    def close(self) -> None:
        """Print the last line, unless the work was short, and no more."""
        with self._lock:
            if self._shown:
                self._shown = False
                short = time.monotonic() - self._began < INTERVAL and not self._forced
                _display.remove(self, "" if short else self.line())

    def _print(self) -> None:
        self._next = time.monotonic() + INTERVAL
        if self._shown:
            _display.print(self)


def set_quiet(quiet: bool) -> None:
    """Show no progress of this process, such as one of several hosts that do the same work."""
    _display.quiet = quiet


class _Display:
    """Hold the work that is shown now, and draw it on a terminal."""

    def __init__(self) -> None:
        self.quiet = False
        self._lock = threading.RLock()
        self._active: list[Progress] = []
        self._live: Any = None  # rich.live.Live while there is work on a terminal
        self._printed: dict[int, float] = {}  # what was done at the last line, by the work's id

    def add(self, progress: Progress) -> None:
        with self._lock:
            self._active.append(progress)
            if self._live is None and sys.stderr.isatty():
                self._live = _live(self._text)
                if self._live is not None:
                    self._live.start()

    def remove(self, progress: Progress, line: str) -> None:
        with self._lock:
            self._active.remove(progress)
            live = self._live
            if live is not None and not self._active:
                self._live = None
                live.stop()
            # In a file a line that differs in nothing but the time would say the same again.
            printed = self._printed.pop(id(progress), None)
            if line and (live is not None or printed != progress.done):
                _write(line)

    def print(self, progress: Progress) -> None:
        with self._lock:
            if self._live is None:
                self._printed[id(progress)] = progress.done
                _write(progress.line())

    def _text(self) -> Any:
        from rich.text import Text

        width = min(WIDTH, self._live.console.width) if self._live is not None else WIDTH
        lines = [progress.line(width) for progress in list(self._active)]
        return Text("\n".join(lines), no_wrap=True, overflow="crop")


_display = _Display()


def _live(text: Callable[[], Any]) -> Any:
    """Return rich's display of `text()`, which also prints other lines on stderr above it; None for
    a terminal that cannot draw a line again (TERM=dumb, TTY_INTERACTIVE=0), where it shows nothing.
    """
    from rich.console import Console
    from rich.live import Live

    class VisibleCursor(Console):
        # A process that ends at once (exits.py) could not show the cursor again.
        def show_cursor(self, show: bool = True) -> bool:
            return False

    console = VisibleCursor(stderr=True)
    if not console.is_interactive:
        return None
    return Live(
        get_renderable=text,
        console=console,
        refresh_per_second=REFRESHES,
        transient=True,
        redirect_stdout=False,  # rich would send it to stderr
    )


def _write(line: str) -> None:
    # In one piece, so that Ctrl-C does not come before the end of the line.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _shortened(text: str, width: int) -> str:
    """Return the end of the text, which distinguishes paths, in at most `width` columns."""
    return text if len(text) <= width else "..." + text[len(text) - max(0, width - 3) :]


def _duration(seconds: float) -> str:
    """Return "0:07", "12:34", "1:02:03" or "2d 03:04"."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"

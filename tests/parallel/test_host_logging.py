"""Check that every line on stderr of a host has its number, whichever library writes it."""

import logging
import sys
import warnings

import pytest
from absl import logging as absl_logging

from blip3o_jax.parallel import host_logging


@pytest.fixture
def restored(monkeypatch):
    """Restore the global state of logging, absl and warnings."""
    root, absl = logging.getLogger(), logging.getLogger("absl")
    package = logging.getLogger("blip3o_jax")
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(absl, "filters", list(absl.filters))
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(package, "level", package.level)
    handler = absl_logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "formatter", handler.formatter)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    # A command of an earlier test may have captured warnings, within a context of warnings that has
    # ended: capturing again would do nothing.
    logging.captureWarnings(False)
    warnings.simplefilter("always")  # in pytest's own context
    yield root
    logging.captureWarnings(False)


def test_lines_of_every_library_have_the_hosts_number(restored, capsys):
    """Log after a handler like the one of Orbax's import is there."""
    restored.addHandler(logging.StreamHandler(sys.stderr))
    host_logging.log_to_stderr(1, 2)
    logging.getLogger("orbax").warning("slow\nstorage")
    absl_logging.warning("absl's")
    logging.getLogger("blip3o_jax.data").warning("a record")
    logging.getLogger("blip3o_jax.data").info("only of host 0")
    warnings.warn("deprecated", stacklevel=1)
    try:
        raise ValueError("caught")
    except ValueError:
        logging.exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("host 1: ") for line in lines), lines
    texts = [line.removeprefix("host 1: ") for line in lines]
    assert texts[:4] == ["slow", "storage", "absl's", "a record"]
    assert texts[4].endswith("UserWarning: deprecated") and texts[5] == "failed"
    assert texts[-1] == "ValueError: caught"


def test_absls_own_handler_has_the_hosts_number(restored):
    """Add the number to the handler that replaces the others on stderr where a library starts as an
    absl program.
    """
    host_logging.log_to_stderr(1, 2)
    record = logging.LogRecord("orbax", logging.WARNING, "file.py", 1, "two\n%s", ("lines",), None)
    assert absl_logging.get_absl_handler().format(record) == "host 1: two\nhost 1: lines"


def test_host_0_has_no_prefix_and_follows_stderr(restored, capsys, monkeypatch):
    """Follow `sys.stderr`: a progress line replaces `sys.stderr` while it is shown; the log has to
    go through it.
    """
    host_logging.log_to_stderr(0, 1)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    logging.getLogger("blip3o_jax.ar").info("attention: splash")
    assert capsys.readouterr() == ("attention: splash\n", "")

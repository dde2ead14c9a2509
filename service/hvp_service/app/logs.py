"""The log of a server: one line on stderr for each thing that happened, whoever tells of it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO, cast, final

import structlog
from structlog.typing import Processor

from hvp_service.calls.record import add_call

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

#: Packages of this project that tell what they do by Python's own logging.
_OURS = ("hvp_core", "hvp_workers")


def configure_logs(level: Level = "info", form: Format = "auto") -> None:
    """Give all lines of this process one form: ours, libraries', and Python's warnings.

    Args:
        level: The least level of our own lines; libraries' have to be warnings at least.
        form: `json`, or `console` for people; `auto` is for people where stderr is a terminal.
    """
    out = cast(TextIO, Patient(sys.stderr))
    number = logging.getLevelNamesMapping()[level.upper()]
    for_people = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if for_people
        else structlog.processors.JSONRenderer(serializer=_json)
    )
    shared: Sequence[Processor] = (
        structlog.contextvars.merge_contextvars,
        add_call,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.PositionalArgumentsFormatter(),
                *shared,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(number)
    logging.captureWarnings(True)
    adopt_loggers()


# Made once: `json.dumps` makes one each time, which takes longer than a line's encoding.
_ENCODER = json.JSONEncoder(default=repr)


def _json(line: Any, **_: Any) -> str:
    return _ENCODER.encode(line)


def adopt_loggers() -> None:
    """Take from libraries' loggers the handlers by which they write to the terminal themselves.

    Some, as Ray and transformers, come with one; so this is done again once they are imported.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            for handler in [*logger.handlers]:
                if isinstance(handler, logging.StreamHandler) and not isinstance(
                    handler, logging.FileHandler
                ):
                    logger.removeHandler(handler)
                    logger.propagate = True


@final
class Patient:
    """A stream whose writes do not fail: where the log goes may be full, or gone.

    A call is not refused because its line cannot be written.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or leave it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return 0

    def flush(self) -> None:
        """Hand on what was written, or leave it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

"""Every error that quantmill raises on purpose.

    QuantmillError                 exit 1: our failure
    ├── Busy                       no room for one more request just now; says when to come back
    └── UserError                  exit 2: something the caller can mend
        ├── BadRequest             a parameter or a combination of them that cannot be served
        ├── SourceNotFound         no such folder, file, repository or branch
        ├── UnsupportedModel       an architecture, a tensor layout or a file type we do not know
        ├── BadCheckpoint          a model folder that is incomplete, corrupt or contradicts itself
        ├── BadText                calibration or evaluation text that cannot be used
        └── CannotResume           a work folder that belongs to another run

A message says what was found, what is needed and what to type next, in one line.
"""

import re


class QuantmillError(Exception):
    """Something went wrong that the user cannot mend."""

    exit_code = 1


class Busy(QuantmillError):
    """There is no room for one more request just now; `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UserError(QuantmillError):
    """Something the caller can mend; the message says how."""

    exit_code = 2


class BadRequest(UserError):
    """A parameter, or a combination of parameters, that cannot be served."""


class SourceNotFound(UserError):
    """A folder, file, repository or branch that does not exist here."""


class UnsupportedModel(UserError):
    """An architecture, a tensor layout or a file type that quantmill does not know."""


class BadCheckpoint(UserError):
    """A model folder that is incomplete, corrupt or contradicts itself."""


class BadText(UserError):
    """Calibration or evaluation text that cannot be used."""


class CannotResume(UserError):
    """A work folder that belongs to another run, or to none."""


def said_by(error: Exception, most: int = 100) -> str:
    """A library's first sentence on a failure, for a line of ours: without the place in its source."""
    first = re.sub(r"^\[?\S+\.(cc|cpp|cu|h|hpp):\d+\]\s*", "", str(error).strip()).partition("\n")[0]
    return first.partition(". ")[0][-most:] or type(error).__name__

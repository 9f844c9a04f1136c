"""Errors for people: what was wrong, where, and what to do about it.

Every error that a user can cause derives from :class:`RouterError`; the commands print its message as one line
and exit with :attr:`RouterError.exit_code`, the server turns it into the dialect's error shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from router.policy import Problem


class RouterError(Exception):
    """Base of all errors that are explained to a person rather than traced.

    ``exit_code`` is the status a command ends with: 1, the work failed; 2, the call was wrong.
    """

    exit_code = 1


class UsageError(RouterError):
    """The call itself was wrong: a flag, a path, a name that is not there."""

    exit_code = 2


class DatasetError(RouterError):
    """A dataset or one of its rows cannot be used. The message names file, line and field."""


class EncoderError(RouterError):
    """An encoder is missing, damaged, or not the one that a bundle was trained with."""


class BundleError(RouterError):
    """A bundle is missing, damaged, of a newer schema, or does not reproduce its probes."""


class PolicyError(RouterError):
    """A policy is not valid. The message names the key and, where known, the line.

    Parameters
    ----------
    message : str
        The first of the problems, and how many more there are.
    problems : tuple of router.policy.Problem
        All of them; empty where the file cannot be read as YAML or JSON.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class SourceError(RouterError):
    """What a policy comes from cannot be read or reached; of the policy itself that says nothing."""


class LedgerError(RouterError):
    """The ledger cannot be opened, read or written. The message never holds a password of its URL."""


class BudgetError(RouterError):
    """Where budgets are counted cannot be opened, read or written. The message never holds a password of its URL."""


class RequestError(RouterError):
    """A request to the server is wrong; becomes an HTTP 4xx in the dialect's error shape.

    Parameters
    ----------
    message : str
        For the caller; never holds a key, a prompt or a traceback.
    status : int
        HTTP status, 400 by default.
    param : str or None
        The field of the body that is wrong.
    code : str or None
        A short stable word, as OpenAI's ``error.code``.
    headers : mapping, optional
        What the answer carries beside it: ``www-authenticate``, ``retry-after``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class UpstreamError(RouterError):
    """A provider answered with an error, or not at all.

    Parameters
    ----------
    message : str
        The provider's words with secrets removed.
    status : int
        The status the provider gave, or 502 / 504 where it gave none.
    retry_after : str or None
        The provider's ``Retry-After``, passed on as it came.
    type, code, param : str or None
        The fields of the provider's error, where it has them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        retry_after: str | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.type = type
        self.code = code
        self.param = param


def run_command(name: str, command: Callable[[], Any], *, missing: str = "") -> NoReturn:
    """Run a command line and end the process: what a user can cause is one line on standard error, never a traceback.

    Parameters
    ----------
    name : str
        The command, for the head of the line.
    command : callable
        Parses the arguments and does the work; what it returns, where a number, is the exit status.
    missing : str
        What to do about a package that is not installed.
    """
    try:
        status = command()
    except RouterError as error:
        _fail(name, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if not missing:
            raise
        _fail(name, f"{error.name} is not installed; {missing}", 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail(name, f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        # click's own errors, by their looks: typer may carry click inside, under another name.
        kind = type(error).__name__
        if kind == "Abort":  # a question without an answer
            _fail(name, "stopped: no answer was given", 1)
        if kind == "NoArgsIsHelpError":  # its message is the help
            print(error, file=sys.stderr)
            sys.exit(2)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(name, error.format_message(), error.exit_code)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _fail(name: str, message: str, status: int) -> NoReturn:
    print(f"{name}: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)

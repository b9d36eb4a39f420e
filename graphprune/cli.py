"""The command line: arguments in, exit codes out.

    graphprune model.onnx --channels 0.3        prune, verify, write model.pruned.onnx
    graphprune inspect model.onnx               list the coupling groups
    graphprune inspect model.onnx --why A B     the chain of operations that ties two tensors
    graphprune engine model.onnx                hand it to TensorRT

Everything heavy is imported by the verbs themselves, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from graphprune.arguments import parse
from graphprune.errors import BudgetError, EngineError, GraphPruneError, SparsityError, VerificationError

#: Exit codes. An interrupted command ends with 128 + the signal's number, as shells have it.
OK, FAILED, BAD_INPUT, BUG = 0, 1, 2, 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, 1 (verification failed, or a budget out of reach), 2 (bad input), 130 (interrupted).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(given)
        with _terminable(), _plain_warnings(options.quiet):
            code = _verb(options.verb)(options)
            sys.stdout.flush()
            return code
    except GraphPruneError as error:
        return _fail(
            str(error),
            FAILED
            if isinstance(error, VerificationError | BudgetError | SparsityError | EngineError)
            else BAD_INPUT,
        )
    except BrokenPipeError:
        # Whoever read us has seen enough. The interpreter would complain once more when it closes stdout.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated; nothing was written", 128 + signal.SIGTERM)
    except MemoryError:
        return _fail("out of memory; nothing was written", BAD_INPUT)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return _fail(f"internal error, please report it with the lines above: {error!r}", BUG)


def _verb(name: str) -> Callable[[argparse.Namespace], int]:
    """What carries out a verb; the others are not imported."""
    if name == "inspect":
        from graphprune.verbs.inspect import run
    elif name == "engine":
        from graphprune.verbs.engine import run
    else:
        from graphprune.verbs.prune import run
    return run


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"graphprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code


# -- signals and warnings ---------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM; not an Exception, so that nothing on the way takes it for an error."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files are removed."""

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings(quiet: bool) -> Iterator[None]:
    """Warnings as one line each, without the place in the code that raised them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        with suppress(OSError):
            print(f"graphprune: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        if quiet:
            warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())

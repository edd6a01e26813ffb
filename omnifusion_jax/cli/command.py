"""What the command lines share: how flags are parsed, and how errors and --help are printed."""

import inspect
import os
import re
import sys

from absl import app, flags, logging

from omnifusion_jax.cli.help import page
from omnifusion_jax.errors import OmniFusionError
from omnifusion_jax.fields import fields, nearest

HELP = {"--help", "-help", "-h", "-?", "--helpshort"}
MISSING = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


def run(main, *sections, argv=None, failed=1):
    """Runs `main` as `absl.app.run` does, with its FieldFlags `sections`.

    Three things differ: an OmniFusionError, or a wrong flag, is one line on stderr and the exit status
    `failed`, without a traceback; so is Ctrl-C, with status 130; and --help ends with status 0.
    """

    def guarded(argv):
        try:
            return main(argv)
        except OmniFusionError as error:
            print(f"error: {error}", file=sys.stderr)
            return failed
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 130

    def parse(argv):
        module = sys.modules[main.__module__]
        own = flags.FLAGS.get_key_flags_for_module(module)
        if HELP & set(argv[1:]):
            show(page(inspect.getdoc(module), own, sections))
            sys.exit()
        try:
            return parsed(argv, [flag.name for flag in own], sections)
        except SystemExit as exit:
            print(exit.code, file=sys.stderr)
            sys.exit(failed)

    logging.set_verbosity(logging.WARNING)  # or Orbax prints a page at every save
    app.run(guarded, argv, flags_parser=parse)


def show(text: str):
    """Prints a text; the reader may stop early, as in `--help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsed(argv, known, sections=(), flag_values=flags.FLAGS):
    """Takes the flags from `argv` and returns the other words. Exits with one line if a flag is wrong.

    Args:
      known: names of flags that may be suggested instead of an unknown one, besides those of `sections`.
    """
    try:
        argv = flag_values.read_flags_from_files(argv, force_gnu=False)  # --flagfile
        for section in sections:
            argv = section.take(argv)
        rest = flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: there is no flag --{error.flagname}; {instead(error.flagname, known, sections)}")
    except (flags.Error, ValueError) as error:  # ValueError: --noNAME=value, and ConfigError
        message = MISSING.sub(r"--\1 is missing; --help says what it is", str(error))
        # every missing flag has a line of its own
        sys.exit(f"error: {message.removeprefix('flag ')}".replace("\n", ". "))
    if len(rest) > 1:
        sys.exit(f"error: unexpected {' '.join(rest[1:])}: flags are written --NAME=value; --help lists them")
    return rest


def instead(name: str, known, sections) -> str:
    """What to do about a flag that there is not; arguments as in `parsed`."""
    brought = [
        f"--{section.name}.{choice}"
        for section in sections
        for choice, (path, part) in section.choices().items()
        if name.removeprefix(f"{section.name}.{path}.") in fields(part)
    ]
    if brought:
        return f"it goes with {' or '.join(brought)}"
    there = [*known, *(f"{section.name}.{path}" for section in sections for path in section.fields)]
    meant = nearest(name, there)
    return f"is --{meant} meant? --help lists all" if meant else "--help lists those there are"

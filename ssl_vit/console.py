"""The command `ssl-vit`: `ssl-vit pretrain --recipe mae` is `python ssl_vit/pretrain.py --recipe mae`, wherever it is
installed.
"""

import argparse
import importlib
import sys

from ssl_vit import __version__, errors
from ssl_vit.commands import COMMANDS, HelpFormatter, own_words, summary
from ssl_vit.errors import UserError, nearest


def main() -> None:
    """Run the sub-command that sys.argv names, as if its module were the script; then exit."""
    errors.run(_main)


def _main() -> int | None:
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="ssl-vit",
        usage="ssl-vit COMMAND [ARGUMENTS]",
        description="Pre-train Vision Transformers by interchangeable objectives, and compare them.",
        epilog="commands, each of which has a --help:\n"
        + "\n".join(f"  {name:{width}}{summary(name)}" for name in COMMANDS),
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="print this")
    parser.add_argument("--version", action="version", version=f"ssl_vit {__version__}", help="print the version")
    if len(sys.argv) < 2:
        parser.print_help()
        return 2
    name, *arguments = sys.argv[1:]
    if name.startswith("-"):
        parser.parse_args([name])
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    if COMMANDS[name].startswith("eval."):
        importlib.import_module("ssl_vit.own_eval")
    sys.argv = [f"ssl-vit {name}", *arguments]
    module = importlib.import_module(COMMANDS[name])
    module.__doc__ = own_words(module.__doc__ or "")
    return module.main()


if __name__ == "__main__":
    main()

"""The `pmae` command. Torch is imported inside the commands, so that `pmae --help` answers at once."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perceptual_mae_models.commands.convert import convert
from perceptual_mae_models.commands.images import embed, similar
from perceptual_mae_models.commands.models import list_models, show_info
from perceptual_mae_models.commands.serve import serve
from perceptual_mae_models.commands.weights import download, verify
from perceptual_mae_models.version import __version__

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 130, 141, 143  # argparse exits with 2 on wrong usage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 1 after an error, which stands on stderr in a line or a few; after Ctrl-C, SIGTERM, or
        where the reader of a pipe has left, 128 and the signal's number.

    Raises:
        SystemExit: With status 2, the arguments are wrong; with 0, help was asked for.
    """
    arguments = _parser().parse_args(argv)
    with _ending_in_order():
        return _run(arguments)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Makes SIGTERM an exception, so that what is written beside an output is removed; in threads it stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name of a file may have what a console or pipe has not
    try:
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        # The reader of `pmae list | head` has left; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("\npmae: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    # What we raise, and torch, timm and the Hub's client raise for files, names, devices and networks, is of these.
    except (OSError, ValueError, RuntimeError) as error:
        print(f"pmae: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return status


def _at_least(lowest: int, highest: int = sys.maxsize) -> Any:
    def parse(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        if value > highest:
            raise argparse.ArgumentTypeError(f"{value} is more than {highest}")
        return value

    parse.__name__ = "integer"  # argparse puts it into its message for text that is no number
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pmae", description="Perceptual MAE image encoders: list them, compute features.")
    parser.add_argument("--version", action="version", version=f"pmae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="the encoders, and where their weights are")
    command.add_argument(
        "filter", nargs="?", metavar="FILTER", help="part of a name, or a pattern such as 'vit_*mae_in1k'"
    )
    command.set_defaults(run=list_models)

    command = commands.add_parser("info", help="all facts about one model")
    command.add_argument("name", metavar="NAME", help="a timm name, with or without tag")
    command.set_defaults(run=show_info)

    command = commands.add_parser("download", help="weights from the Hub, before they are needed")
    command.add_argument("names", nargs="+", metavar="NAME", help="a tag of `pmae list`")
    command.add_argument(
        "--to", type=Path, metavar="DIR", help="a folder (of several names: one each in it), instead of the Hub's cache"
    )
    command.set_defaults(run=download)

    command = commands.add_parser("verify", help="whether weights are the files that were published")
    command.add_argument("targets", nargs="+", metavar="NAME", help="a tag of `pmae list`, or a downloaded folder")
    command.set_defaults(run=verify)

    command = commands.add_parser("embed", help="features of images, into one file")
    command.add_argument("paths", nargs="+", metavar="PATH", help="images, folders (searched recursively), patterns")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".npz, .safetensors or .parquet"
    )
    _add_extractor_options(command, pools=("avg", "cls", "cls+avg", "tokens", "map"))
    command.set_defaults(run=embed)

    command = commands.add_parser("similar", help="a picture of the nearest neighbours of images in a folder")
    command.add_argument("queries", nargs="+", metavar="QUERY", help="images to look for")
    command.add_argument("folder", metavar="FOLDER", help="where to look")
    command.add_argument("-k", type=_at_least(1), default=5, metavar="N", help="neighbours of each query (default: 5)")
    command.add_argument(
        "-o", "--output", type=Path, default=Path("similar.png"), metavar="FILE", help="default: similar.png"
    )
    _add_extractor_options(command, pools=("avg", "cls", "cls+avg"))
    command.set_defaults(run=similar)

    command = commands.add_parser("convert", help="somebody's MAE checkpoint, made a weight file of ours")
    _add_convert_options(command)
    command.set_defaults(run=convert)

    command = commands.add_parser("serve", help="a page to try the models on, in the browser")
    _add_serve_options(command)
    command.set_defaults(run=serve, batch_size=64, workers=0, skip_broken=True)
    return parser


def _add_convert_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("file", type=Path, metavar="FILE", help="of facebookresearch/mae, Hugging Face, Lightning or timm")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the encoder, .safetensors")
    add("--model", metavar="NAME", help="a model of `pmae list` (default: the one with the checkpoint's shapes)")
    add("--dtype", choices=("float32", "float16"), default="float32", help="on the disk (default: float32)")
    add("--drop", action="append", default=[], metavar="PREFIX", help="tensors to leave out; may be repeated")
    add("--decoder", type=Path, metavar="FILE", help="write its plain MAE decoder too, .safetensors")
    add("--decoder-heads", type=_at_least(1), metavar="N", help="where the checkpoint does not say")
    add(
        "--norm-pix-loss",
        action=argparse.BooleanOptionalAction,
        help="whether the decoder predicts standardised patches, where the checkpoint does not say",
    )


def _add_serve_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--folder", type=Path, metavar="DIR", help="images to look for neighbours in (encoded once, at the start)")
    add("--model", default="vit_pico_patch8_pmae", metavar="NAME", help="of the neighbours (default: %(default)s)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s, this machine only")
    add("--name", action="append", default=[], metavar="HOST", help="answer to this name too, that of a proxy")
    add("--port", type=_at_least(0, 65535), default=7860, metavar="N", help="default: %(default)s; 0: a free one")


def _add_extractor_options(command: argparse.ArgumentParser, pools: Sequence[str]) -> None:
    add = command.add_argument
    add(
        "--model",
        default="vit_pico_patch8_pmae",
        metavar="NAME",
        help="any timm name or hf-hub: id (default: %(default)s)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights, or a run's folder, in place of the published ones",
    )
    add("--pool", choices=pools, default="avg", help="mean of patch tokens, class token, ... (default: avg)")
    add("--batch-size", type=_at_least(1), default=64, metavar="N", help="images a forward pass (default: 64)")
    add("--workers", type=_at_least(0), default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="arithmetic (default: float32)")
    add("--skip-broken", action="store_true", help="leave out unreadable images and name them, rather than stopping")


if __name__ == "__main__":
    sys.exit(main())

"""The `pmae` command. Torch is imported inside the commands, so that `pmae --help` answers at once."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptual_mae_models.version import __version__

if TYPE_CHECKING:
    from perceptual_mae_models.features import FeatureBatch, FeatureExtractor

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130  # argparse exits with 2 on wrong usage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 1 after an error, which stands on stderr in a line or a few.

    Raises:
        SystemExit: With status 2, the arguments are wrong; with 0, help was asked for.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        # The reader of `pmae list | head` has left; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        print("\npmae: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    # What we raise, and torch, timm and the Hub's client raise for files, names, devices and networks, is of these.
    except (OSError, ValueError, RuntimeError) as error:
        print(f"pmae: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return status


def list_models(arguments: argparse.Namespace) -> int:
    """`pmae list`: a table of the registered encoders."""
    import timm

    import perceptual_mae_models.vision_transformer_pmae  # noqa: F401  registers

    names = timm.list_models(
        f"*{arguments.filter}*" if arguments.filter else "", module="vision_transformer_pmae", include_tags=True
    )
    if not names:
        raise ValueError(f"no model matches {arguments.filter!r}; `pmae list` names all")
    architectures = {name.partition(".")[0] for name in names}
    facts = {name: _describe(name) for name in architectures}
    defaults = {f"{name}.{facts[name]['cfg'].get('tag')}" for name in architectures}
    rows = [("model", "input", "params", "dim", "weights")]
    for name in names:
        fact = facts[name.partition(".")[0]]
        cfg = timm.models.get_pretrained_cfg(name)
        assert cfg is not None, f"timm lists {name} without a configuration"
        size = " x ".join(map(str, cfg.input_size[1:]))
        mark = " *" if name in defaults else ""
        rows.append((name + mark, size, f"{fact['params'] / 1e6:.1f} M", str(fact["dim"]), _weights_place(vars(cfg))))
    _print_table(rows, right={"params", "dim"})
    print("\n* the default tag: the model's name alone means this one")
    return EXIT_OK


def show_info(arguments: argparse.Namespace) -> int:
    """`pmae info`: all facts about a model."""
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    from perceptual_mae_models.features import check_model_name

    check_model_name(arguments.name)
    facts = _describe(arguments.name)
    cfg = facts.pop("cfg")
    lines = [
        ("model", ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))),
        ("weights", _weights_place(cfg)),
        ("repository", cfg.get("hf_hub_id")),
        ("file", cfg.get("file")),
        ("licence", cfg.get("license")),
        ("paper", " ".join(str(cfg[key]) for key in ("paper_name", "paper_ids") if cfg.get(key))),
        ("origin", cfg.get("origin_url")),
        ("parameters", f"{facts.pop('params'):,}"),
        *((key, value) for key, value in facts.items()),
    ]
    for label, value in lines:
        if value not in (None, ""):
            print(f"{label:<13}{value}")
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))  # type: ignore[no-untyped-call]
    print("transform")
    for step in transform.transforms:
        print(f"    {step}")
    provenance = Path(cfg["file"]).with_suffix(".json") if cfg.get("file") else None
    if provenance and provenance.is_file():
        print("provenance")
        print(json.dumps(json.loads(provenance.read_text(encoding="utf-8")), indent=4, ensure_ascii=False))
    return EXIT_OK


def embed(arguments: argparse.Namespace) -> int:
    """`pmae embed`: features of many images into one file."""
    from perceptual_mae_models.images import find_images
    from perceptual_mae_models.writers import FeatureWriter, check_output

    check_output(arguments.output)
    files = find_images(arguments.paths)
    extractor = _extractor(arguments)
    start = time.perf_counter()
    with FeatureWriter(arguments.output, extractor.metadata) as writer:
        for batch in _stream(extractor, files, arguments):
            writer.write(batch.names, batch.features)
        if not writer.rows:
            raise ValueError(f"none of the {len(files)} images could be read; nothing was written")
    seconds = time.perf_counter() - start
    shape = " x ".join(map(str, (writer.rows, *extractor.feature_shape)))
    print(f"{arguments.output}: {shape} features in {seconds:.1f} s ({writer.rows / seconds:.0f} images/s)")
    if writer.rows < len(files):
        print(f"{len(files) - writer.rows} of {len(files)} images were broken and are left out", file=sys.stderr)
    return EXIT_OK


def similar(arguments: argparse.Namespace) -> int:
    """`pmae similar`: a picture of the nearest neighbours of some images in a folder."""
    from perceptual_mae_models.features import FeatureBatch
    from perceptual_mae_models.gallery import GalleryRow, Tile, nearest, neighbour_gallery
    from perceptual_mae_models.images import find_images, open_image
    from perceptual_mae_models.writers import check_output

    check_output(arguments.output, (".png", ".jpg", ".webp"))
    queries = find_images(arguments.queries)
    files = find_images([arguments.folder])
    extractor = _extractor(arguments)
    query_features = extractor(queries, arguments.batch_size, arguments.workers)
    query_batch = FeatureBatch(tuple(map(str, queries)), query_features, ())
    matches = nearest(query_batch, _stream(extractor, files, arguments), arguments.k)
    if not any(matches):
        raise ValueError(f"{arguments.folder} holds no image but the queries")

    rows = []
    for query, found in zip(queries, matches, strict=True):
        tiles = [Tile(open_image(match.name), Path(match.name).name, match.similarity) for match in found]
        rows.append(GalleryRow(Tile(open_image(query), query.name), tiles))
        print(query)
        for match in found:
            print(f"    {match.similarity:.4f}  {match.name}")
    facts = extractor.metadata
    weights = facts["tag"] or facts["weights"]
    subtitle = f"{facts['model']}, {weights}; cosine similarity of {facts['pool']} features; {len(files)} images"
    neighbour_gallery(rows, subtitle=subtitle).save(arguments.output)
    print(arguments.output)
    return EXIT_OK


class Progress:
    """A line on stderr that counts images, with their rate and the time left; silent unless stderr is a terminal."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.start = time.perf_counter()
        self.visible = sys.stderr.isatty()

    def advance(self, images: int) -> None:
        """Counts images, and shows the line."""
        self.done += images
        if not self.visible:
            return
        rate = self.done / (time.perf_counter() - self.start)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
        self._show(f"{self.done}/{self.total} images, {rate:.0f} images/s, {left} left")

    def note(self, message: str) -> None:
        """Prints a message that stays, above the line; also where there is no terminal."""
        self.clear()
        print(message, file=sys.stderr)

    def clear(self) -> None:
        """Removes the line."""
        if self.visible:
            self._show("")

    def _show(self, line: str) -> None:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _extractor(arguments: argparse.Namespace) -> "FeatureExtractor":
    from perceptual_mae_models.features import FeatureExtractor

    return FeatureExtractor(
        arguments.model, arguments.pool, arguments.device, arguments.dtype, checkpoint=arguments.checkpoint
    )


def _stream(
    extractor: "FeatureExtractor", files: Sequence[Path], arguments: argparse.Namespace
) -> Iterator["FeatureBatch"]:
    """Streams features with a progress line; names broken images, or says how to go on without them."""
    from perceptual_mae_models.images import ImageError

    progress = Progress(len(files))
    try:
        for batch in extractor.stream(files, arguments.batch_size, arguments.workers, arguments.skip_broken):
            for broken in batch.broken:
                progress.note(f"skipped {broken}")
            progress.advance(len(batch.names) + len(batch.broken))
            yield batch
    except ImageError as error:
        raise ImageError(error.name, f"{error.reason} (--skip-broken leaves such images out)") from error
    finally:
        progress.clear()


def _describe(name: str) -> dict[str, Any]:
    """Facts of a model that need it built, on the meta device where weights cost nothing."""
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False)
    facts: dict[str, Any] = {
        "cfg": model.pretrained_cfg,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "dim": model.num_features,
    }
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        facts["depth"] = len(model.blocks)
        facts["patch size"] = " x ".join(map(str, model.patch_embed.patch_size))
        facts["tokens"] = f"{model.patch_embed.num_patches} patches + {model.num_prefix_tokens} prefix"
    return facts


def _weights_place(cfg: Mapping[str, Any]) -> str:
    from perceptual_mae_models.weights import NOT_PUBLISHED

    if cfg.get("file"):
        return "in the package" if Path(cfg["file"]).is_file() else "missing from the package"
    if NOT_PUBLISHED in (cfg.get("notes") or ()):
        return "not published yet"
    return f"on the Hub: {cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else "none"


def _print_table(rows: Sequence[Sequence[str]], right: Iterable[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = [">" if title in right else "<" for title in rows[0]]
    for row in rows:
        cells = [f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _at_least(lowest: int) -> Any:
    def parse(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
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
    return parser


def _add_extractor_options(command: argparse.ArgumentParser, pools: Sequence[str]) -> None:
    add = command.add_argument
    add(
        "--model",
        default="vit_pico_patch8_pmae",
        metavar="NAME",
        help="any timm name or hf-hub: id (default: %(default)s)",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="weights to load in place of the published ones")
    add("--pool", choices=pools, default="avg", help="mean of patch tokens, class token, ... (default: avg)")
    add("--batch-size", type=_at_least(1), default=64, metavar="N", help="images a forward pass (default: 64)")
    add("--workers", type=_at_least(0), default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="arithmetic (default: float32)")
    add("--skip-broken", action="store_true", help="leave out unreadable images and name them, rather than stopping")


if __name__ == "__main__":
    sys.exit(main())

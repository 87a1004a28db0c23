"""`pmae convert`: other people's checkpoints."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perceptual_mae_models.convert import Conversion
    from perceptual_mae_models.convert_sources import Source


def convert(arguments: argparse.Namespace) -> int:
    """`pmae convert`: an encoder, and on request its decoder, out of somebody's checkpoint."""
    from perceptual_mae_models.writers import OutputError, check_output

    outputs: list[Path] = [path for path in (arguments.output, arguments.decoder) if path]
    for path in outputs:
        check_output(path, (".safetensors",))
    if len({path.resolve() for path in (arguments.file, *outputs)}) <= len(outputs):
        raise OutputError("the checkpoint and what is written must be different files")
    if not arguments.decoder and (arguments.decoder_heads or arguments.norm_pix_loss is not None):
        raise ValueError("--decoder-heads and --norm-pix-loss say something of --decoder FILE, which is not given")

    from perceptual_mae_models.convert import convert_encoder, save_weights
    from perceptual_mae_models.convert_decoder import convert_decoder
    from perceptual_mae_models.convert_sources import read_source

    source = read_source(arguments.file)
    conversion = convert_encoder(source, arguments.model, arguments.dtype, arguments.drop)
    decoder = None
    if arguments.decoder:
        decoder = convert_decoder(
            source,
            conversion,
            arguments.dtype,
            heads=arguments.decoder_heads,
            norm_pix_loss=arguments.norm_pix_loss,
        )
    _print_report(source, conversion)
    save_weights(arguments.output, conversion.encoder, conversion.metadata)
    print(_describe_file(arguments.output, len(conversion.encoder), arguments.dtype))
    if decoder:
        save_weights(arguments.decoder, *decoder)
        print(_describe_file(arguments.decoder, len(decoder[0]), arguments.dtype))
    return 0


def _print_report(source: "Source", conversion: "Conversion") -> None:
    place = (source.prefix or conversion.place).rstrip(".") or "the top level"
    lines = [
        ("format", conversion.metadata["source_format"]),
        ("sha256", source.sha256),
        ("model", conversion.architecture),
        ("encoder", f"{_count(conversion.mapped)}, at {place}"),
    ]
    lines += [("not encoder", f"{group.prefix}: {_count(group.count)}, {group.reason}") for group in conversion.dropped]
    lines += [("note", note) for note in conversion.notes]
    if "licence_note" in conversion.metadata:
        lines.append(("licence", conversion.metadata["licence_note"]))
    for label, value in lines:
        print(f"{label:<13}{value}")


def _describe_file(path: Path, tensors: int, dtype: str) -> str:
    return f"wrote {path}: {_count(tensors)}, {dtype}, {path.stat().st_size / 1e6:.1f} MB"


def _count(tensors: int) -> str:
    return f"{tensors} tensor{'' if tensors == 1 else 's'}"

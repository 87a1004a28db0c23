"""`pmae list` and `pmae info`: what there is, and where its weights are."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def list_models(arguments: argparse.Namespace) -> int:
    """`pmae list`: a table of the registered encoders."""
    from perceptual_mae_models.vision_transformer_pmae import facts_of, list_encoders

    names = list_encoders(f"*{arguments.filter}*" if arguments.filter else "", tags=True)
    if not names:
        raise ValueError(f"no model matches {arguments.filter!r}; `pmae list` names all")
    architectures = {name.partition(".")[0] for name in names}
    facts = {name: describe_model(name) for name in architectures}
    defaults = {f"{name}.{facts[name]['cfg'].get('tag')}" for name in architectures}
    rows = [("model", "input", "params", "dim", "weights")]
    for name in names:
        fact = facts[name.partition(".")[0]]
        cfg = facts_of(name)
        size = " x ".join(map(str, cfg.input_size[1:]))
        mark = " *" if name in defaults else ""
        rows.append((name + mark, size, f"{fact['params'] / 1e6:.1f} M", str(fact["dim"]), weights_place(vars(cfg))))
    print_table(rows, right={"params", "dim"})
    print("\n* the default tag: the model's name alone means this one")
    return 0


def show_info(arguments: argparse.Namespace) -> int:
    """`pmae info`: all facts about a model."""
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    from perceptual_mae_models.building import check_model_name

    check_model_name(arguments.name)
    facts = describe_model(arguments.name)
    cfg = facts.pop("cfg")
    lines = [
        ("model", ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))),
        ("weights", weights_place(cfg)),
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
    return 0


def describe_model(name: str) -> dict[str, Any]:
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


def weights_place(cfg: Mapping[str, Any]) -> str:
    """Say where the weights of a pretrained cfg are to be had."""
    from perceptual_mae_models.unreadable import NOT_PUBLISHED

    if cfg.get("file"):
        return "in the package" if Path(cfg["file"]).is_file() else "missing from the package"
    if NOT_PUBLISHED in (cfg.get("notes") or ()):
        return "recipe only, not published yet"
    return f"on the Hub: {cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else "none"


def print_table(rows: Sequence[Sequence[str]], right: Iterable[str]) -> None:
    """Print aligned columns; the first row is their titles, `right` names those that hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = [">" if title in right else "<" for title in rows[0]]
    for row in rows:
        cells = [f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True)]
        print("  ".join(cells).rstrip())

"""What frozen features are worth: any encoders, any labelled images, one table.

    python training/evaluate.py vit_pico_patch8_pmae vit_pico_patch8_pmae@random pixels:16 --data photos/

`--help` explains every flag; `training/evaluate/command.py` is what runs.
"""

import tyro

try:
    from training.evaluate.command import Options, main
except ModuleNotFoundError as error:
    raise SystemExit(f"evaluate.py: {error}: pip install 'perceptual-mae-models[evaluate]'") from error

if __name__ == "__main__":
    main(tyro.cli(Options))

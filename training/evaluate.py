"""What representations are worth: any encoders, any images, one table.

    python training/evaluate.py vit_pico_patch8_pmae vit_pico_patch8_pmae@random pixels:16 --data photos/

`--help` explains every flag; `training/evaluate/command.py` is what runs.
"""

import tyro

try:
    from training.evaluate.command import main
    from training.evaluate.options import Options
except ModuleNotFoundError as error:
    raise SystemExit(f"evaluate.py: {error}: pip install -e '.[evaluate]'") from error

if __name__ == "__main__":
    try:
        options = tyro.cli(Options)
    except ValueError as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    main(options)

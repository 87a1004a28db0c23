"""`python -m perceptual_mae_models` is the `pmae` command."""

import sys

from perceptual_mae_models.cli import main

if __name__ == "__main__":
    sys.exit(main())

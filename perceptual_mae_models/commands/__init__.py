"""What the `pmae` command does, a function of parsed arguments each; torch is imported inside them."""

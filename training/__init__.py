"""Pretraining, evaluation and export of Perceptual MAE encoders. Runs from a clone; never part of the wheel."""

"""The networks that pretraining optimises."""

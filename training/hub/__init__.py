"""Repositories of weights on the Hugging Face Hub: what is in one, and its model card."""

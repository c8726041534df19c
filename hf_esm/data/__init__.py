"""Rows in, batches of model inputs out."""

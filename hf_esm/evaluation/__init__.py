"""Measuring merged models: folders and rows in, scores, comparisons and reports out."""

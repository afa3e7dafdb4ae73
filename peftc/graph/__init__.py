"""Graphs: a model's entries captured as Programs, the table of its arguments, rows in front."""

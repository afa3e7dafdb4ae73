"""Rewriting: what passes are written with: pipeline, verifier, lowering, the algebra of folding."""

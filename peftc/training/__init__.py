"""Recipes over stock trainers."""

"""Amortised inference: networks trained on simulations of a program, for all its data."""

"""Samples for any model: drawn at random, or from MovieLens."""

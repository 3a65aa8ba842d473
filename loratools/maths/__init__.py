"""Matrices in, matrices out: nothing here knows the name of a tensor, a layout or an architecture."""

"""Magnifier: small digits in coloured frames on photographs, read by coarse-only, Flex and dense models."""

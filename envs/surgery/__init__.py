"""Cutting and masking: filter groups as data, slicing, masks, limits, MACs targets, kept channels."""

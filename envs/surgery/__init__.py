"""Cutting and masking: filter groups as data, slices, masks, limits, MACs targets, kept channels."""

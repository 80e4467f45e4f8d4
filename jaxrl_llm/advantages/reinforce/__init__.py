"""Advantages without a group or a value model: raw, signed, and relative to the batch or to the past."""

"""Calibration: what a model's layers are fed decides how their weights are rounded."""

"""Defences: each a frozen dataclass of hyper-parameters with `protect`, its mathematics in pure functions."""

"""Pools of Ray actors. No other module imports Ray."""

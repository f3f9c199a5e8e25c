"""Allocation of a bit budget to matrices: candidate specs, their predicted losses, and the choice among them."""

"""Weights become compressed layers."""

"""Verification of an output against its manifest, and of a source against known hashes."""

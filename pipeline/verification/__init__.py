"""Verifying an output against its manifest, a source against known hashes, and the upload of verified outputs."""

"""File systems, stores, leases and typed records."""

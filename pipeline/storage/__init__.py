"""File systems and object stores behind one interface, leases on directories, and the JSON records in them."""

"""How work is planned, dealt out and carried out."""

"""What people look at: tables and result files."""

"""What a user asks for, from start to end: compress, restore, evaluate, sweep."""

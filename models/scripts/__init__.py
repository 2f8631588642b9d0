"""Scripts that made the files in models/weights."""

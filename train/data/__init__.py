"""Documents in, packed token rows out."""

"""Where metrics go. Every sink lives on the writing rank only and has `write(record)` and `close()`."""

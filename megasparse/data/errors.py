"""What the data tools raise."""


class DataError(Exception):
    """An input, a tokenizer or an output path cannot be used; the message names it and says what to do."""

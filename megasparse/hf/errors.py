"""What a conversion raises."""


class ConvertError(Exception):
    """A conversion cannot be done; the message names the file or setting and says what to do."""

"""What conversion and inference raise, and how they quote the errors of libraries."""


class ConvertError(Exception):
    """A conversion cannot be done; the message names the file or setting and says what to do."""


class AccelerateError(Exception):
    """A model cannot be accelerated; the message names the layer and says what to do."""


class GenerateError(Exception):
    """Text cannot be generated; the message says what is wrong with the model or the options and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, cut off at 200 characters; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

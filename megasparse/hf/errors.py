"""What conversion and inference raise."""


class ConvertError(Exception):
    """A conversion cannot be done; the message names the file or setting and says what to do."""


class AccelerateError(Exception):
    """A model cannot be accelerated; the message names the layer and says what to do."""


class GenerateError(Exception):
    """Text cannot be generated; the message says what is wrong with the model or the options and what to do."""

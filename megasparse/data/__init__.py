"""Raw text -> tokenised data sets in Megatron's `.bin`/`.idx` format, and the tokenizers for it."""

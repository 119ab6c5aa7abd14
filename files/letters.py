"""Text that files, tokenizers and screens can hold."""


def whole_letters(text: str) -> str:
    """A text whose halves of letters (lone surrogates, which JSON can carry) are '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")

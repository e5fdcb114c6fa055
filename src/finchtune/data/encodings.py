"""Text that is not UTF-8: what it probably is, and how to convert it."""

SAMPLE_BYTES = 1 << 16
FEWEST_BAD = 3
# Those that files of text really have; with all that exist to choose from, guesses get worse.
LIKELY = (
    *("utf_32", "utf_16", "utf_16_le", "utf_16_be"),
    *("gb18030", "big5", "cp932", "cp949", "cp1251", "cp1252"),
)


def conversion_hint(path: str, content: bytes) -> str:
    """What to do about a file with this content: one clause, or "" where little speaks for any.

    A few bad bytes in text that is UTF-8 else are damage, and no other encoding.
    """
    import charset_normalizer

    sample = content[:SAMPLE_BYTES]
    readable = sample.decode("utf-8", "ignore")
    bad = len(sample) - len(readable.encode()) + readable.count("\0")
    if bad < FEWEST_BAD or bad < sum(not c.isascii() for c in readable):
        return ""
    found = charset_normalizer.from_bytes(sample, cp_isolation=list(LIKELY)).best()
    if found is None:
        return ""
    name = found.encoding.upper().replace("UTF_", "UTF-").replace("_", "")
    if name.startswith("GB"):
        name = "GB18030"
    return f"; it looks like {name}: iconv -f {name} -t UTF-8 '{path}' > converted"

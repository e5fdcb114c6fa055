"""Where a text ends: stop strings, matched on decoded text as it grows."""

from collections.abc import Sequence

from finchtune.tokenizer import Decoder, Tokenizer


class StoppingText:
    """The text of a row as it grows. What may be the beginning of a stop string is held back.

    `text` is what was released, which never holds any of the stop strings or what followed one.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self.decoder = Decoder(tokenizer)
        self.stop_strings = [s for s in stop_strings if s]
        self.text = ""
        self.held = ""
        self.ends: list[int] = []  # characters complete after each token
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that a token releases, possibly empty; `stopped` tells if a string was met."""
        self.held += self.decoder.feed(token)
        self.ends.append(len(self.text) + len(self.held))
        return self._release(self._n_held_back())

    def finish(self) -> str:
        """What is left at the end."""
        if self.stopped:
            return ""
        self.held += self.decoder.finish()
        return self._release(0)

    @property
    def n_tokens(self) -> int:
        """How many tokens it takes for the text that lies before the stop string."""
        complete = max((end for end in self.ends if end <= len(self.text)), default=0)
        return self.ends.index(complete) + 1 if complete else 0

    def _release(self, n_held_back: int) -> str:
        places = [p for p in map(self.held.find, self.stop_strings) if p >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(self.held) - n_held_back
        released, self.held = self.held[:end], "" if self.stopped else self.held[end:]
        self.text += released
        return released

    def _n_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(s.startswith(self.held[-n:]) for s in self.stop_strings):
                return n
        return 0

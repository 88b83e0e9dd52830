"""Text of a response while it is being written, token by token."""

from pipeline.codec import Codec

# What an unfinished character decodes to: one of Korean or an emoji is several byte-level tokens.
UNFINISHED = "\ufffd"


class TextStream:
    """Turns tokens into the text that they add; what may still change is held back.

    Put together, the pieces are `Codec.text` of all tokens, `conversation` as there.
    """

    def __init__(self, codec: Codec, conversation: bool = False) -> None:
        self.codec = codec
        self.conversation = conversation
        self.ids: list[int] = []
        self.told = ""

    def put(self, token: int) -> str:
        """The text that is certain with this token, beyond what was told."""
        self.ids.append(token)
        text = self._text()
        # The template's lead is cut off once it is whole: until then it is no text.
        if not self.told and self.codec.is_lead(text, self.conversation):
            return ""
        text = text[: len(text) - self.codec.stop_strings.begun(text)]
        # Some decoders take a blank back before the next sign.
        return self._tell(text.rstrip(UNFINISHED + " "))

    def end(self) -> str:
        """The rest."""
        return self._tell(self._text())

    def _text(self) -> str:
        return self.codec.text(self.ids, self.conversation)

    def _tell(self, text: str) -> str:
        new = text[len(self.told) :]
        self.told += new
        return new

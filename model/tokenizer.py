"""Text to token ids and back, incrementally."""

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from model.errors import CheckpointError

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not a whole character yet


class Tokenizer:
    """The checkpoint's tokenizer.json. Prompts start with the begin-of-sentence token if the model has one."""

    def __init__(self, directory: str | Path, bos_token_id: int | None):
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; give token ids with --prompt-ids instead of --prompt")
        try:
            self.tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from None
        self.bos = [] if bos_token_id is None else [bos_token_id]

    @classmethod
    def find(cls, directory: str | Path, bos_token_id: int | None, *, required: bool) -> "Tokenizer | None":
        """The tokenizer of a checkpoint; None if there is none and prompts are token ids."""
        if not required and not (Path(directory) / "tokenizer.json").is_file():
            return None
        return cls(directory, bos_token_id)

    def encode(self, text: str) -> list[int]:
        return self.bos + self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class TextStream:
    """Turns the growing token list of one sequence into pieces of text; holds back characters that are not complete.

    Without a tokenizer the pieces are the token ids.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        if self.tokenizer is None:
            return f"{token} "
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith(UNFINISHED) else self._piece(text)

    def finish(self) -> str:
        return "" if self.tokenizer is None else self._piece(self.tokenizer.decode(self.ids))

    def _piece(self, text: str) -> str:
        piece, self.shown = text[self.shown :], len(text)
        return piece

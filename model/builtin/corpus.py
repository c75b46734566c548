"""The text of the built-in model: reading, splitting, tokenizing and cutting it into training windows.

`read_books` gives books as lists of chapters, `split_held_out` takes every 50th chapter away, `train_tokenizer` builds
the byte-level BPE, `Windows` yields endless batches.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
BOS_ID, EOS_ID = 0, 1


def read_books(text_file: str | None) -> list[list[str]]:
    """Books as lists of chapters; a chapter is its verses, one per line."""
    if text_file:  # blank lines end a paragraph; the whole file is one book
        return [[p.strip() for p in re.split(r"\n\s*\n", Path(text_file).read_text(encoding="utf-8")) if p.strip()]]
    if not shutil.which("bible"):
        sys.exit(
            "the King James text comes from Debian's package bible-kjv: apt-get install bible-kjv (or --text FILE)"
        )
    raw = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True).stdout
    books: dict[str, dict[str, list[str]]] = {}
    for line in raw.splitlines():
        label, verse = line.split(" ", 1)
        book, chapter = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+", label).groups()
        books.setdefault(book, {}).setdefault(chapter, []).append(verse.strip())
    return [["\n".join(verses) for verses in chapters.values()] for chapters in books.values()]


def split_held_out(books: list[list[str]]) -> tuple[list[str], list[str]]:
    """Training books (chapters joined by blank lines) and every 50th chapter."""
    train, held_out, count = [], [], 0
    for chapters in books:
        kept = []
        for chapter in chapters:
            count += 1
            (held_out if count % 50 == 0 else kept).append(chapter)
        train.append("\n\n".join(kept) + "\n")
    if not held_out:
        sys.exit(f"the text must have at least 50 chapters or paragraphs (between blank lines), got {count}")
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any UTF-8 text encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Windows:
    """Endless batches of token windows that start at a verse, each with BOS in front."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, generator: torch.Generator):
        ids = [tokenizer.encode(text).ids + [EOS_ID] for text in texts]
        self.stream = torch.tensor([i for book in ids for i in book])
        newline = torch.tensor(["\n" in tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())])
        ends = newline[self.stream] | (self.stream == EOS_ID)
        starts = ends.roll(1) & ~ends  # the first token after a line end
        starts[0] = True
        self.starts = starts.nonzero().flatten()
        self.generator, self.queue, self.length = generator, [], 0

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """[rows, length + 1]: position 0 is BOS; inputs are [:, :-1], targets [:, 1:]."""
        if length != self.length:  # starts queued for another length may be too close to the end
            self.queue, self.length = [], length
        while len(self.queue) < rows:  # one pass over the text, cut at another offset each time
            shift = int(torch.randint(length, (1,), generator=self.generator))
            cuts = torch.arange(shift, len(self.stream) - 2 * length, length)
            begins = self.starts[torch.searchsorted(self.starts, cuts).clamp(max=len(self.starts) - 1)]
            begins = begins[begins < len(self.stream) - length]
            self.queue += begins[torch.randperm(len(begins), generator=self.generator)].tolist()
        picked, self.queue = self.queue[:rows], self.queue[rows:]
        windows = [torch.cat([torch.tensor([BOS_ID]), self.stream[b : b + length]]) for b in picked]
        return torch.stack(windows)

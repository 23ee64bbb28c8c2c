"""Tokens → shuffled, packed rows → batches. Everything goes on exactly from a small state.

Which example comes next follows from (seed, domain, how many came before) and the contents of the shuffle buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.text import Encoder, Example, Source, Tokens, example, place
from dino_value.seeds import exchange, generator

IGNORED = -100
"""The label of a position that does not count."""
_ROWS_AHEAD = 16  # rows that best-fit packing fills at a time


class Batch(NamedTuple):
    """B rows of L tokens."""

    ids: Tensor
    """[B L]"""
    labels: Tensor
    """[B L], the next token, or IGNORED."""
    counted: Tensor
    """[T], positions with a label in the flattened batch."""
    segments: Tensor | None = None
    """[B L], the document of each token, from 1 (0: padding); None where all of a row is one context."""

    @classmethod
    def of(cls, rows: Tensor, counted: Tensor, segments: Tensor | None = None) -> Batch:
        """From tokens [B L+1], whether each counts as a label, and their documents."""
        counts = counted[:, 1:]
        if segments is not None:
            counts = counts & (segments[:, 1:] == segments[:, :-1])
            segments = segments[:, :-1]
        labels = rows[:, 1:].where(counts, IGNORED)
        return cls(rows[:, :-1].contiguous(), labels, counts.flatten().nonzero().squeeze(1), segments)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows; on the CPU, since how many labels they have decides shapes."""
        ids, labels = self.ids[start:stop], self.labels[start:stop]
        counted = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
        return Batch(ids, labels, counted, None if self.segments is None else self.segments[start:stop])


def attention(batch: Batch) -> dict[str, Tensor]:
    """What a Hugging Face model is given besides the ids: nothing for plain causal rows, else each document alone.

    Returns:
        `attention_mask` [B 1 L L], additive, and `position_ids` [B L] that begin anew with each document.
    """
    if batch.segments is None:
        return {}
    s, length = batch.segments, batch.segments.shape[1]
    allowed = (s[:, :, None] == s[:, None, :]) & torch.ones(length, length, dtype=torch.bool, device=s.device).tril()
    mask = torch.zeros(allowed.shape, device=s.device).masked_fill(~allowed, torch.finfo(torch.float32).min)
    places = torch.arange(length, device=s.device).expand_as(s)
    new = torch.cat([torch.ones_like(s[:, :1], dtype=torch.bool), s[:, 1:] != s[:, :-1]], 1)
    positions = places - places.where(new, 0).cummax(1).values
    return {"attention_mask": mask[:, None], "position_ids": positions}


class Shuffled:
    """Endless positions of `size` items: each is drawn from a buffer of the next ones; a pass has each item once."""

    def __init__(self, size: int, buffer: int, seed: int, name: str) -> None:
        self.size, self.capacity, self.seed, self.name = size, buffer, seed, name
        self.drawn = self.read = 0
        self.buffer: list[int] = []

    def next(self) -> int:
        if not self.buffer:  # a new pass
            self.read = min(self.capacity, self.size)
            self.buffer = list(range(self.read))
        draw = generator(self.seed, "buffer", self.name, self.drawn)
        place = int(torch.randint(len(self.buffer), (), generator=draw))
        found = self.buffer[place]
        self.drawn += 1
        if self.read < self.size:
            self.buffer[place] = self.read
            self.read += 1
        else:
            self.buffer[place] = self.buffer[-1]
            self.buffer.pop()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "read": self.read, "buffer": torch.tensor(self.buffer, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.read, self.buffer = state["drawn"], state["read"], state["buffer"].tolist()


class TextStream:
    """Packed rows of a mixture of domains.

    The next example comes from the domain whose tokens are furthest behind its weight's share, so the shares hold in
    tokens, not in examples.

    Args:
        length: L, of a row; it holds L+1 tokens, the last one a label only.
        without: examples to pass over.
        packing: `concat`, examples end to end, cut where a row ends; or `best_fit`: rows are filled with whole
            examples, each into the fullest row that has room (arXiv 2404.10830), and documents do not see each other.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        encoder: Encoder,
        length: int,
        packing: str,
        buffer: int,
        seed: int,
        name: str,
        without: frozenset[Example] = frozenset(),
    ) -> None:
        self.sources, self.encoder, self.length, self.packing = sources, encoder, length, packing
        self.without = without
        self.weights = {domain: weights.get(domain, 1.0) for domain in sources}
        self.order = {
            domain: Shuffled(len(source), buffer, seed, f"{name} {domain}") for domain, source in sources.items()
        }
        self.tokens = dict.fromkeys(sources, 0)
        self._open = Tokens([], [])  # concat: what did not fill a row yet
        self._rows: list[tuple[Tokens, list[int]]] = []  # best_fit: rows not handed out yet

    def batch(self, rows: int) -> Batch:
        """The next rows."""
        found = [self._row() for _ in range(rows)]
        size = self.length + 1
        ids = torch.full((rows, size), self.encoder.end)
        counted, segments = torch.zeros(rows, size, dtype=torch.bool), torch.zeros(rows, size, dtype=torch.int64)
        for row, (tokens, parts) in enumerate(found):
            used = len(tokens.ids)
            ids[row, :used] = torch.tensor(tokens.ids)
            counted[row, :used] = torch.tensor(tokens.counted)
            segments[row, :used] = torch.tensor(parts)
        return Batch.of(ids, counted, segments if self.packing == "best_fit" else None)

    def _next(self) -> Tokens:
        domain = min(self.sources, key=lambda name: self.tokens[name] / self.weights[name])
        source, order = self.sources[domain], self.order[domain]
        for _ in range(2 * len(source)):
            index = order.next()
            one = example(source, index)
            if one not in self.without:
                break
        else:
            raise UserError(f"{source.name}: every record is also among the feedback; give other unlabeled text")
        found = self.encoder.encode(one)
        self.tokens[domain] += len(found.ids)
        if self.packing == "best_fit" and not any(found.counted[1 : self.length + 1]):
            raise UserError(
                f"{place(source, index)}: its prompt fills the row of {self.length} tokens and leaves no room for the "
                "answer; raise data.length (value.length), or choose data.packing=concat"
            )
        return found

    def _row(self) -> tuple[Tokens, list[int]]:
        if self.packing == "best_fit":
            if not self._rows:
                self._rows = self._fitted()
            return self._rows.pop(0)
        size = self.length + 1
        ids, counted = self._open
        while len(ids) < size:
            tokens = self._next()
            ids, counted = ids + tokens.ids, counted + tokens.counted
        # The last token is the next row's first: every token is a label once.
        self._open = Tokens(ids[self.length :], counted[self.length :])
        return Tokens(ids[:size], counted[:size]), [1] * size

    def _fitted(self) -> list[tuple[Tokens, list[int]]]:
        size, pieces, total = self.length + 1, [], 0
        while total < _ROWS_AHEAD * size:
            tokens = self._next()
            # A longer document goes on in a piece of its own, which begins with the last token of the one before.
            for start in range(0, max(1, len(tokens.ids) - 1), self.length):
                pieces.append(Tokens(tokens.ids[start : start + size], tokens.counted[start : start + size]))
                total += len(pieces[-1].ids)
        return [_joined(row) for row in best_fit(pieces, size)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": {domain: order.state_dict() for domain, order in self.order.items()},
            "tokens": dict(self.tokens),
            "open": [list(part) for part in self._open],
            "rows": [[list(tokens.ids), list(tokens.counted), list(parts)] for tokens, parts in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for domain, order in self.order.items():
            order.load_state_dict(state["order"][domain])
        self.tokens = dict(state["tokens"])
        self._open = Tokens(*state["open"])
        self._rows = [(Tokens(ids, counted), parts) for ids, counted, parts in state["rows"]]


def best_fit(pieces: Sequence[Tokens], size: int) -> list[list[Tokens]]:
    """Best-fit decreasing: the longest first, each into the fullest row with room for it."""
    rows: list[list[Tokens]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        needed = len(piece.ids)
        fits = [(space, row) for row, space in enumerate(room) if space >= needed]
        if fits:
            row = min(fits)[1]
            rows[row].append(piece)
            room[row] -= needed
        else:
            rows.append([piece])
            room.append(size - needed)
    return rows


def _joined(pieces: Sequence[Tokens]) -> tuple[Tokens, list[int]]:
    ids = [token for piece in pieces for token in piece.ids]
    counted = [count for piece in pieces for count in piece.counted]
    return Tokens(ids, counted), [number for number, piece in enumerate(pieces, 1) for _ in piece.ids]


def padded(tokens: Sequence[Tokens], end: int) -> Batch:
    """One example a row, padded on the right: causal attention never looks there."""
    size = max(len(one.ids) for one in tokens)
    ids, counted = torch.full((len(tokens), size), end), torch.zeros(len(tokens), size, dtype=torch.bool)
    for row, one in enumerate(tokens):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        counted[row, : len(one.ids)] = torch.tensor(one.counted)
    return Batch.of(ids, counted)


class ExampleSet:
    """Labelled examples, one a row, in batches that are a function of (seed, name, number).

    Args:
        length: tokens of an example, at most.
        cut: drop what is longer from the right, rather than refuse it.

    Attributes:
        originals: the examples as they were given.
        examples: as they teach: `exchanged` gives them other answers.

    Raises:
        UserError: an example that is too long, or whose prompt leaves no room for an answer.
    """

    def __init__(
        self, examples: Sequence[Example], encoder: Encoder, length: int, batch_size: int, seed: int, name: str,
        cut: bool = False,
    ) -> None:  # fmt: skip
        self.originals, self.seed, self.name, self.end = tuple(examples), seed, name, encoder.end
        self.examples, self.encoder, self.length = list(examples), encoder, length
        self.batch_size = min(batch_size, len(self.examples))
        self.per_epoch = len(self.examples) // self.batch_size
        self.tokens = [encoder.encode(one) for one in self.examples]
        for number, one in enumerate(self.tokens):
            if len(one.ids) > length and not cut:
                raise UserError(
                    f"{name}, example {number + 1}: {len(one.ids)} tokens, longer than {length}; leave it out, or for "
                    "feedback raise feedback.length (within the model's window) or set feedback.cut=true"
                )
            if not any(one.counted[1:length]):
                raise UserError(
                    f"{name}, example {number + 1}: its prompt fills the window of {length} tokens and leaves no "
                    "room for the answer; leave it out, or for feedback raise feedback.length within the model's window"
                )
        self.tokens = [Tokens(one.ids[:length], one.counted[:length]) for one in self.tokens]

    def exchanged(self, indices: Iterable[int], drawn: torch.Generator) -> ExampleSet:
        """The same set, but each prompt among `indices` carries the answer of another one among them.

        Everything else stays: which examples make a batch, and the originals. An answer that the length has no room
        for is cut. Plain documents, which have no prompt, keep their text.

        Raises:
            UserError: fewer than two prompts.
        """
        places = [index for index in sorted(set(indices)) if self.examples[index].prompt]
        if len(places) < 2:
            raise UserError(
                f"{self.name}: answers are to be exchanged (feedback.shuffle, value.lookahead.contrast) among "
                f"{len(places)} prompts; give more examples with prompts, or a larger feedback.batch_size"
            )
        donors = [places[index] for index in exchange(len(places), drawn)]
        other = copy.copy(self)
        other.examples, other.tokens = list(self.examples), list(self.tokens)
        for own, donor in zip(places, donors, strict=True):
            other.examples[own] = self.examples[own]._replace(answer=self.examples[donor].answer)
            ids, counted = self.encoder.encode(other.examples[own])
            other.tokens[own] = Tokens(ids[: self.length], counted[: self.length])
        return other

    def __len__(self) -> int:
        return len(self.examples)

    def indices(self, number: int) -> list[int]:
        """Which examples make batch `number`; each pass has every one once (the remainder is dropped)."""
        epoch, position = divmod(number, self.per_epoch)
        order = torch.randperm(len(self), generator=generator(self.seed, self.name, epoch))
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def batch(self, number: int) -> Batch:
        return self.rows(self.indices(number))

    def rows(self, indices: Sequence[int]) -> Batch:
        return padded([self.tokens[index] for index in indices], self.end)

"""Text → tokens → rows: what is counted, what is isolated, and that a stream goes on exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.errors import UserError
from dino_value.language.learner import Learner
from dino_value.language.stream import (
    IGNORED,
    Batch,
    ExampleSet,
    Shuffled,
    TextStream,
    attention,
    best_fit,
    padded,
)
from dino_value.language.text import Encoder, Example, Tokens, example, open_source, read_examples


def stream(root: Path, encoder: Encoder, **changes: Any) -> TextStream:
    settings: dict[str, Any] = {
        "weights": {},
        "encoder": encoder,
        "length": 40,
        "packing": "concat",
        "buffer": 7,
        "seed": 0,
        "name": "stream",
    }
    if "sources" not in changes:
        settings["sources"] = {"main": open_source(str(root / "stream.jsonl"))}
    return TextStream(**{**settings, **changes})


def same(a: Batch, b: Batch) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def test_gsm8k_form_and_counted_tokens(root: Path, encoder: Encoder, tokenizer: Any) -> None:
    one = read_examples(str(root / "test.jsonl"))[0]
    assert one.prompt.startswith("Question: ")
    assert one.prompt.endswith("\n Answer:")
    tokens = encoder.encode(one)
    kept = [token for token, counted in zip(tokens.ids, tokens.counted, strict=True) if counted]
    assert tokenizer.decode(kept[:-1]) == one.answer
    assert kept[-1] == tokenizer.eos_token_id
    assert all(Encoder(tokenizer, answer_only=False).encode(one).counted)


def test_concat_loses_no_token(root: Path, encoder: Encoder) -> None:
    rows = stream(root, encoder).batch(12)
    again = stream(root, encoder)
    tokens = [again._next() for _ in range(60)]
    ids = torch.tensor([token for one in tokens for token in one.ids])
    counted = torch.tensor([count for one in tokens for count in one.counted])
    assert torch.equal(rows.ids.flatten(), ids[: 12 * 40])
    expected = ids[1 : 12 * 40 + 1].where(counted[1 : 12 * 40 + 1], IGNORED)
    assert torch.equal(rows.labels.flatten(), expected)
    assert torch.equal(rows.counted, expected.ne(IGNORED).nonzero().squeeze(1))


def test_best_fit_keeps_documents_whole(root: Path, encoder: Encoder) -> None:
    sizes = [5, 4, 3, 3, 2, 1]
    rows = best_fit([Tokens([size] * size, [True] * size) for size in sizes], 6)
    assert [[len(piece.ids) for piece in row] for row in rows] == [[5, 1], [4, 2], [3, 3]]
    batch = stream(root, encoder, packing="best_fit", length=70).batch(8)
    assert batch.segments is not None
    for ids, labels, parts in zip(batch.ids, batch.labels, batch.segments, strict=True):
        for part in range(1, int(parts.max()) + 1):
            inside = ids[parts == part].tolist()
            assert encoder.tokenizer.decode(inside).startswith("Question:")
        crossing = (parts[1:] != parts[:-1]).nonzero().squeeze(1)
        assert (labels[crossing] == IGNORED).all()
        assert (labels[parts == 0] == IGNORED).all()


def test_documents_longer_than_a_row_go_on_in_the_next(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(["7"] * 100)}))
    sources = {"main": open_source(str(tmp_path / "long.jsonl"))}
    batch = stream(tmp_path, encoder, sources=sources, packing="best_fit", length=30).batch(16)
    tokens = len(encoder.encode(read_examples(str(tmp_path / "long.jsonl"))[0]).ids)
    assert len(batch.counted) >= 16 * 30 * 0.7
    assert tokens > 31


def test_isolated_documents_give_what_they_give_alone(root: Path, encoder: Encoder, learner: Learner) -> None:
    batch = stream(root, encoder, packing="best_fit", length=70).batch(3)
    learner.eval()
    with torch.no_grad():
        packed = learner.run(batch).final
        assert batch.segments is not None
        for row in range(3):
            for part in range(1, int(batch.segments[row].max()) + 1):
                inside = batch.segments[row] == part
                ids = batch.ids[row][inside][None]
                alone = learner.run(Batch(ids, ids, ids[0])).final[0]
                assert torch.allclose(packed[row][inside], alone, atol=1e-5)


def test_positions_begin_anew() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]])
    given = attention(Batch(segments, segments, segments[0], segments))
    assert given["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    allowed = (given["attention_mask"][0, 0] == 0).int().tolist()
    assert allowed[2] == [1, 1, 1, 0, 0, 0]
    assert allowed[4] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_stream_goes_on_exactly(root: Path, encoder: Encoder, packing: str) -> None:
    one = stream(root, encoder, packing=packing)
    for _ in range(5):
        one.batch(3)
    other = stream(root, encoder, packing=packing)
    other.load_state_dict(one.state_dict())
    assert all(same(one.batch(3), other.batch(3)) for _ in range(30))  # past the end of the file
    assert not same(stream(root, encoder, packing=packing).batch(3), stream(root, encoder, seed=1).batch(3))


def test_every_pass_has_each_item_once() -> None:
    order = Shuffled(10, 4, 0, "x")
    first, second = [order.next() for _ in range(10)], [order.next() for _ in range(10)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_mixtures_hold_their_weights_in_tokens(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "1 2"}) + "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(["9"] * 30)}) + "\n")
    sources = {name: open_source(str(tmp_path / f"{name}.jsonl")) for name in ("short", "long")}
    mixed = stream(tmp_path, encoder, sources=sources, weights={"short": 1.0, "long": 3.0}, length=60)
    mixed.batch(40)
    share = mixed.tokens["long"] / sum(mixed.tokens.values())
    assert abs(share - 0.75) < 0.03


def test_feedback_is_passed_over(root: Path, encoder: Encoder) -> None:
    source = open_source(str(root / "stream.jsonl"))
    taught = frozenset(example(source, index) for index in range(0, 200, 2))
    left = stream(root, encoder, without=taught)
    drawn = Counter(tuple(left._next().ids) for _ in range(90))
    assert not {tuple(encoder.encode(one).ids) for one in taught} & set(drawn)
    with pytest.raises(UserError, match="also among the feedback"):
        stream(root, encoder, without=frozenset(example(source, index) for index in range(200)))._next()


def test_padding_changes_no_label(encoder: Encoder) -> None:
    batch = padded([Tokens([5, 6, 7, 8], [False, False, True, True]), Tokens([5, 6], [False, True])], 0)
    assert batch.ids.tolist() == [[5, 6, 7], [5, 6, 0]]
    assert batch.labels.tolist() == [[IGNORED, 7, 8], [6, IGNORED, IGNORED]]


def test_example_sets_visit_all(root: Path, encoder: Encoder) -> None:
    examples = ExampleSet(read_examples(str(root / "feedback.jsonl")), encoder, 64, 4, 0, "feedback")
    assert sorted(index for number in range(4) for index in examples.indices(number)) == list(range(16))
    assert examples.indices(0) != examples.indices(4)


def test_exchanged_answers(root: Path, encoder: Encoder) -> None:
    numbered = [Example(f"Question: Ann has {n} pens\n Answer:", f" {n}") for n in range(9)]
    document = Example("", "Ann has 1 pens")
    examples = ExampleSet([*numbered, document], encoder, 64, 4, 0, "feedback")
    other = examples.exchanged(range(10), torch.Generator().manual_seed(0))
    assert [one.prompt for one in other.examples] == [one.prompt for one in examples.examples]
    answers = [one.answer for one in other.examples[:9]]
    assert sorted(answers) == [one.answer for one in numbered]
    assert all(given != own.answer for given, own in zip(answers, numbered, strict=True))
    assert other.examples[9] == document
    assert other.tokens == [encoder.encode(one) for one in other.examples]
    assert other.originals == (*numbered, document) == tuple(examples.examples)
    few = examples.exchanged([3, 5, 3], torch.Generator())  # among some alone
    assert [index for index in range(10) if few.examples[index] != examples.examples[index]] == [3, 5]
    for among in ([4], [4, 9], []):
        with pytest.raises(UserError, match="feedback: answers are to be exchanged"):
            examples.exchanged(among, torch.Generator())


def test_an_exchanged_answer_is_cut_to_the_length(root: Path, encoder: Encoder) -> None:
    long = Example("Question: Ann has 1 pens and 2 books\n Answer:", " 3")
    short = Example("Question: Ann\n Answer:", " 1 1 1 1 1 1 1 1")
    size = max(len(encoder.encode(one).ids) for one in (long, short))
    other = ExampleSet([long, short], encoder, size, 2, 0, "x").exchanged([0, 1], torch.Generator())
    assert [len(one.ids) for one in other.tokens] == [size, len(encoder.encode(other.examples[1]).ids)]
    assert any(other.tokens[0].counted)


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (({"question": "1", "answer": "2"}, {"question": "1", "answer": " "}), "record 2: the answer is empty"),
        (({"title": "1"},), "fields title; expected one of"),
        (([1],), "expected an object"),
        (({"text": ""},), "the text is empty"),
        ((), "holds no records"),
    ],
)
def test_bad_records(tmp_path: Path, records: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_examples(write(tmp_path / "bad.jsonl", *records))


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{")
    for path, said in (("none.jsonl", "no such file"), ("x.jsonl", "not JSON")):
        with pytest.raises(UserError, match=said):
            read_examples(str(tmp_path / path))
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UserError, match=r"expected \.jsonl"):
        read_examples(str(tmp_path / "x.csv"))


def test_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert [one.answer for one in read_examples(str(tmp_path / "a.txt"))] == ["one\ntwo", "three"]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"problem": ["a"], "solution": ["b"], "other": [1]}), tmp_path / "a.parquet")
    assert read_examples(str(tmp_path / "a.parquet")) == [Example("Question: a\n Answer:", " b")]


def test_prompts_beyond_the_window(root: Path, encoder: Encoder, tmp_path: Path) -> None:
    examples = read_examples(str(root / "feedback.jsonl"))
    longest = max(len(encoder.encode(one).ids) for one in examples)
    with pytest.raises(UserError, match=f"longer than {longest - 1}"):
        ExampleSet(examples, encoder, longest - 1, 4, 0, "feedback")
    with pytest.raises(UserError, match="leaves no room"):
        ExampleSet(examples, encoder, 10, 4, 0, "feedback", cut=True)
    shorter = ExampleSet(examples, encoder, longest - 1, 4, 0, "feedback", cut=True)
    assert max(len(one.ids) for one in shorter.tokens) == longest - 1
    with pytest.raises(UserError, match="leaves no room for the answer"):
        stream(root, encoder, packing="best_fit", length=10).batch(1)


def test_a_tokenizer_without_an_end_token(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        Encoder(bare)

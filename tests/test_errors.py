"""Messages are one line of bounded length, whatever a file put into them."""

from ptqc.errors import CheckpointError, PtqcError, first_line


def test_a_message_is_one_printable_line():
    assert str(PtqcError('the key "a\nb\x1b[31m" is unknown')) == r'the key "a\nb\x1b[31m" is unknown'
    assert str(PtqcError("groups of 32 — größer")) == "groups of 32 — größer"


def test_a_message_keeps_its_beginning_and_its_advice():
    said = str(CheckpointError(f"model.safetensors has the name {'x' * 100_000!r}; save it again"))
    assert len(said) < 1100 and said.startswith("model.safetensors has") and said.endswith("; save it again")


def test_the_first_line_of_foreign_errors():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"

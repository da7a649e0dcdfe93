"""A byte-level BPE tokenizer, trained from text by a command and kept in one file.

::

    python -m examples.pretrain.tokenizer --train texts/ --vocab 32768 --out tokenizer.json

The file is one of the library ``tokenizers``, so a tokenizer of another origin serves as well, as long
as it has the token that ends a document: ``<|end|>``, or one of the names in ``END_TOKENS``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Annotated

import tokenizers
import typer

from examples.pretrain.documents import documents

END = "<|end|>"
END_TOKENS = (END, "<|endoftext|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "</s>")
_SMALLEST = 257  # all bytes, and the end of a document


def train(texts: Iterable[str], *, vocab: int) -> tokenizers.Tokenizer:
    """A tokenizer of at most ``vocab`` tokens, the same one each time for the same texts.

    Raises:
        ValueError: if ``vocab`` has no room for all bytes.
    """
    if vocab < _SMALLEST:
        raise ValueError(f"--vocab: expected at least {_SMALLEST}, got {vocab}.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of the library ``tokenizers``, or it has no end of a document.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--tokenizer: expected a file, got {path}; python -m examples.pretrain.tokenizer "
            "makes one."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"--tokenizer: expected a file of the library tokenizers, got {path}: {error}"
        ) from error
    end_token(tokenizer)
    return tokenizer


def end_token(tokenizer: tokenizers.Tokenizer) -> int:
    """The id of the token that ends a document.

    Raises:
        ValueError: if there is none.
    """
    ids = (tokenizer.token_to_id(name) for name in END_TOKENS)
    end = next((found for found in ids if found is not None), None)
    if end is None:
        raise ValueError(
            f"--tokenizer: expected a token that ends a document, one of {', '.join(END_TOKENS)}, "
            "got none; add one with tokenizers' add_special_tokens."
        )
    return end


def main(
    out: Annotated[pathlib.Path, typer.Option(help="The file to write.")],
    texts: Annotated[
        list[pathlib.Path],
        typer.Option(
            "--train", help="Files or folders of text or JSONL; default: Python's library."
        ),
    ] = [],  # noqa: B006  (typer reads it and changes nothing)
    vocab: Annotated[int, typer.Option(help="Tokens at most.")] = 32_768,
    field: Annotated[
        str, typer.Option(help="The field of a JSON line that has the text.")
    ] = "text",
    pattern: Annotated[str, typer.Option(help="What names of files in folders match.")] = "*",
) -> None:
    """Train a byte-level BPE tokenizer."""
    try:
        tokenizer = train(documents(texts, field=field, pattern=pattern), vocab=vocab)
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out))
    except (ValueError, OSError) as error:
        typer.echo(f"tokenizer: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{tokenizer.get_vocab_size()} tokens in {out}")


if __name__ == "__main__":
    typer.run(main)

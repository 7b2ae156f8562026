"""A text that is longer than the encoder reads: several payloads, read as one prefix.

python examples/encode_and_answer.py     # trains runs/quick, if that is not done
python examples/long_text.py
"""

from pathlib import Path

import tyro

import latentwire_fast as lw

SENTENCES = [
    "Nulnak works every morning as a baker.",
    "Norgil has lived in Tarbek for many years.",
    "Ruxpon is already 56 years old.",
    "The family home of Dennul is in Rimhol today.",
]


def main(run: Path = Path("runs/quick"), length: int = 24) -> None:
    """Cut a text into chunks, encode each, and ask about the first one and the last one.

    Args:
        run: the folder of a trained model.
        length: of a chunk, in the encoder's tokens at most; chunks end with sentences.
    """
    text = " ".join(SENTENCES)
    model = lw.Interlingua.from_pretrained(run / "model")
    (chunks,) = model.encode_chunks([text], length=length)
    total = lw.wire.payload_bytes(chunks)
    print(f"{len(chunks)} payloads, {total} bytes for {lw.wire.utf8_bytes(text)} bytes of text")

    reader = lw.Reader.load("testbed:llama", name="llama")
    receiver = lw.Receiver.of(model, reader)
    for question in ("What is the job of Nulnak?", "Where does Dennul live?"):
        prompt = reader.prompts.build([lw.Turn(question)], context=None, latent=model.mode)
        ids = receiver.generate([prompt], payloads=[chunks])[0]
        print(f"{question} {reader.decode(ids)}")


if __name__ == "__main__":
    tyro.cli(main)

"""Texts to payloads in a file, and answers from that file alone.

    python examples/encode_and_answer.py

The first run trains a small model into runs/quick (two minutes on one core); later ones find it.
"""

from pathlib import Path

import tyro

import latentwire_fast as lw

FACTS = {  # in the words of the built-in task: this model knows no others
    "Nulnak works every morning as a baker.": "What is the job of Nulnak?",
    "Norgil is already 56 years old. Ruxpon has a little dog called Konlis.": "How old is Norgil?",
    "The family home of Dennul is in Rimhol today.": "Where does Dennul live?",
}


def main(run: Path = Path("runs/quick"), preset: str = "testbed_quick") -> None:
    """Encode two texts, and answer a question on each.

    Args:
        run: the folder of the trained model.
        preset: what is trained where that folder is empty.
    """
    config = lw.load_preset(preset)
    lw.train(config, run, evaluate=False)

    # The sender has the encoder. Its questions are not sent: the model has not seen them.
    sender = lw.Interlingua.from_pretrained(run / "model")
    file = run / "texts.lwire"
    lw.wire.write_payloads(file, sender.encode_payloads(list(FACTS)))

    # The receiver has the same model folder, a frozen LLM, and the bytes.
    model = lw.Interlingua.from_pretrained(run / "model")
    reader = lw.load_readers(config.readers)["llama"]
    turns = [lw.Turn(question) for question in FACTS.values()]
    prompts = reader.prompts.build_many(turns, latent=model.mode)
    payloads = list(lw.wire.read_payloads(file))
    answers = lw.Receiver.of(model, reader).generate(prompts, payloads=payloads)
    for turn, payload, ids in zip(turns, payloads, answers, strict=True):
        print(f"{len(payload)} bytes: {turn.question} {reader.decode(ids)}")


if __name__ == "__main__":
    tyro.cli(main)

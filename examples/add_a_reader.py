"""One payload for two models: a second reader learns to read a trained model's payloads.

    python examples/encode_and_answer.py     # trains runs/quick, if that is not done
    python examples/add_a_reader.py

The encoder stays as it is, so what was sent before is read by the new reader too.
"""

from pathlib import Path

import tyro

import latentwire_fast as lw
from latentwire_fast.config.overrides import with_overrides


def main(
    base: Path = Path("runs/quick"),
    run: Path = Path("runs/quick_qwen"),
    preset: str = "testbed_quick",
) -> None:
    """Add the reader qwen, and answer from one payload with both readers.

    Args:
        base: a finished run.
        run: the folder of the run that has the new reader.
        preset: how the new reader is trained.
    """
    config = with_overrides(
        lw.load_preset(preset), base=str(base), readers={"qwen": "testbed:qwen"}
    )
    lw.train(config, run, evaluate=False)

    old = lw.Interlingua.from_pretrained(base / "model")
    payload = old.encode_payloads(["Nulnak works every morning as a baker."])[0]
    turn = lw.Turn("What is the job of Nulnak?")
    for folder, name in ((base, "llama"), (run, "qwen")):
        model = lw.Interlingua.from_pretrained(folder / "model")
        reader = lw.Reader.load(f"testbed:{name}", name=name)
        prompt = reader.prompts.build([turn], context=None, latent=model.mode)
        ids = lw.Receiver.of(model, reader).generate([prompt], payloads=[payload])[0]
        print(f"{name} reads {len(payload)} bytes: {reader.decode(ids)}")


if __name__ == "__main__":
    tyro.cli(main)
